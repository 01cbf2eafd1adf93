"""Asks the demo model the held-out questions and reports how many answers are right.

    python scripts/eval_demo_model.py                            # the shipped model, all questions
    python scripts/eval_demo_model.py --quick --check            # about a fifth of them; fails below the goals
    python scripts/eval_demo_model.py --report docs/demo-model.md

Decoding is greedy with at most 256 new tokens. A right answer holds the key phrase of its topic; a right tool call is
valid JSON with the right function and exactly the right arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from demo_data.chat import END_OF_TEXT, END_OF_TURN
from demo_data.questions import Question, questions
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ASSETS = ROOT / "nanovllm" / "assets" / "demo"
MAX_NEW_TOKENS = 256
SHOWN = 10  # wrong answers of a group on the page
# The least share of right answers, by the beginning of a group's name.
GOALS = {
    "questions en": 0.90, "questions zh": 0.80, "tools en": 0.95, "tools zh": 0.95, "sums": 0.95, "ends with EOS": 0.95,
}  # fmt: skip
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@dataclass(frozen=True)
class Answered:
    """A question with what the model said."""

    question: Question
    answer: str
    ended: bool

    @property
    def right(self) -> bool:
        """Whether the answer is right."""
        return self.ended and self.question.right(self.answer)


def main() -> None:
    """Parses the command line, evaluates and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS, help="model folder (default: the shipped one)")
    parser.add_argument("--quick", action="store_true", help="about a fifth of the questions")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write every answer to this file")
    parser.add_argument("--report", type=Path, default=None, help="put the figures into this Markdown file")
    parser.add_argument("--transformers", action="store_true", help="compute with transformers instead of this engine")
    args = parser.parse_args()
    started = time.time()
    asked = questions(args.seed, args.quick)
    answered = ask_transformers(args.model, asked) if args.transformers else ask_engine(args.model, asked)
    table = figures(answered)
    lines = table_lines(table)
    print("\n".join(lines))
    print(f"{len(answered)} questions in {time.time() - started:.0f} s")
    for item in answered:
        if not item.right:
            print(f"  wrong [{item.question.group}] {item.question.shown} -> {item.answer[:150]}")
    if args.json:
        rows = [
            {
                "group": a.question.group,
                "question": a.question.shown,
                "answer": a.answer,
                "ended": a.ended,
                "right": a.right,
            }
            for a in answered
        ]
        args.json.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    if args.report:
        write_report(args.report, args.model, lines, answered)
    missed = [
        name for name, (right, total) in table.items() for goal in [goal_of(name)] if goal and right < goal * total
    ]
    if args.check and missed:
        sys.exit(f"below the goal: {', '.join(missed)}")


def ask_engine(folder: Path, asked: list[Question]) -> list[Answered]:
    """Greedy answers of the model in ``folder``, computed with this engine."""
    from nanovllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS, skip_special_tokens=False)
    with LLM(str(folder)) as llm:
        outputs = llm.generate([question.prompt for question in asked], params)
    ended = [output.outputs[0].finish_reason == "stop" for output in outputs]
    texts = [output.outputs[0].text.removesuffix(END_OF_TURN).removesuffix(END_OF_TEXT) for output in outputs]
    return [Answered(*row) for row in zip(asked, texts, ended, strict=True)]


def ask_transformers(folder: Path, asked: list[Question]) -> list[Answered]:
    """The same, computed with transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ends = [tokenizer.convert_tokens_to_ids(END_OF_TURN), tokenizer.convert_tokens_to_ids(END_OF_TEXT)]
    ids = [tokenizer(question.prompt, add_special_tokens=False)["input_ids"] for question in asked]
    order = sorted(range(len(asked)), key=lambda i: len(ids[i]))
    answers: dict[int, Answered] = {}
    for start in tqdm(range(0, len(order), 64), unit="batch", dynamic_ncols=True):
        group = order[start : start + 64]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in group]}, return_tensors="pt")
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        out = model.generate(**batch, **greedy, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=ends)
        for i, row in zip(group, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            stops = [at for at, token in enumerate(row) if token in ends]
            text = tokenizer.decode(row[: stops[0]] if stops else row, skip_special_tokens=False)
            answers[i] = Answered(asked[i], text, bool(stops))
    return [answers[i] for i in range(len(asked))]


def figures(answered: list[Answered]) -> dict[str, tuple[int, int]]:
    """Right answers and questions of every group, and the share that ended by itself."""
    table: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for item in answered:
        right, total = table[item.question.group]
        table[item.question.group] = (right + item.right, total + 1)
    result = dict(sorted(table.items()))
    result["ends with EOS"] = (sum(item.ended for item in answered), len(answered))
    return result


def goal_of(group: str) -> float | None:
    """The goal for ``group``, if it has one."""
    return next((goal for name, goal in GOALS.items() if group.startswith(name)), None)


def table_lines(table: dict[str, tuple[int, int]]) -> list[str]:
    """The figures as a Markdown table."""
    lines = ["| held-out group | right | of | share | goal |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, (right, total) in table.items():
        goal = goal_of(name)
        lines.append(f"| {name} | {right} | {total} | {right / total:.1%} | {f'{goal:.0%}' if goal else '–'} |")
    return lines


def write_report(path: Path, folder: Path, lines: list[str], answered: list[Answered]) -> None:
    """Replaces what stands between the two marks of ``path`` by the figures and the failures."""
    made = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    parts = [
        BEGIN,
        "",
        f"{made['parameters'] / 1e6:.2f} million parameters, {size / 1e6:.2f} MB in all; "
        f"SHA-256 of the weights {weights[:16]}.",
        f"Trained {made['steps']} steps on {made['tokens'] / 1e6:.1f} million tokens, seed {made['seed']}, "
        f"rate {made['learning_rate']}, {made['minutes']:.0f} minutes on {made['device']}; "
        f"last loss {made['loss']:.3f}.",
        "",
        *lines,
        "",
        f"Wrong answers, the first {SHOWN} of every group (`--json` writes all):",
        "",
        "| group | question | answer |",
        "| --- | --- | --- |",
    ]
    shown: dict[str, int] = defaultdict(int)
    for item in answered:
        shown[item.question.group] += not item.right
        if not item.right and shown[item.question.group] <= SHOWN:
            answer = item.answer if item.ended else item.answer[:80] + "… (no end)"
            cells = (item.question.group, item.question.shown, answer)
            parts.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    path.write_text(head + "\n".join([*parts, "", END]) + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
