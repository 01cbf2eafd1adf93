"""Text for the demo model: topic files in English and Chinese, and generators that turn them into training examples."""
