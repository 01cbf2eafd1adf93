"""What requests look like, as pydantic models; FastAPI makes the OpenAPI document of them."""
