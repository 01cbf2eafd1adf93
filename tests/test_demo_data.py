"""The text the demo model learns from, and the files that are shipped."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from demo_data import (  # noqa: E402
    arithmetic,
    chat,
    corpus,
    facts,
    families,
    knowledge,
    lists,
    made_up,
    patterns,
    phrases,
    questions,
    tools,
    values,
)

ASSETS = ROOT / "nanovllm" / "assets" / "demo"


def normal(text: str) -> str:
    """``text`` without case, spaces and marks."""
    return re.sub(r"\W", "", text.lower())


def test_every_answer_holds_its_key_phrases_and_no_unfilled_fact() -> None:
    for topic in knowledge.load_topics():
        for side in (topic.en, topic.zh):
            assert knowledge.holds(side.answer, side.keys)
            assert not re.search(r"\{\w+\}", side.answer + side.more), topic.key


def test_key_phrases_tell_topics_apart() -> None:
    """A wrong answer must not pass the check of another topic's question too often: shared keys are the exception."""
    topics = knowledge.load_topics()
    for language in ("en", "zh"):
        confused = [
            (a.key, b.key)
            for a in topics
            for b in topics
            if a is not b and knowledge.holds(b.side(language).answer, a.side(language).keys)
        ]
        assert len(confused) <= len(topics) // 12, confused


def test_a_changed_fact_changes_the_answer() -> None:
    facts = knowledge.load_facts()
    topics = {topic.key: topic for topic in knowledge.load_topics(facts | {"block_size": "32"})}
    assert "32 tokens" in topics["block-size"].en.answer
    assert "32 tokens" in topics["block-size"].en.keys[0]


def test_facts_are_those_of_the_code() -> None:
    """If this fails, a default has changed: write facts.json anew; the next training makes the answers say so."""
    assert knowledge.load_facts() == facts.collect()


def test_a_size_that_answers_state_is_that_of_the_shipped_model() -> None:
    parameters = json.loads((ASSETS / "training.json").read_text())["parameters"]
    assert knowledge.load_facts()["size"] == {4: "four million", 5: "five million"}[round(parameters / 1e6)]


def test_what_answers_name_is_in_the_code() -> None:
    """Commands, options, parameters and fields that answers put between backticks."""
    from nanovllm.config import EngineArgs
    from nanovllm.entrypoints.cli.main import COMMANDS, make_parser
    from nanovllm.entrypoints.serve.args import ServeArgs

    sampling = (ROOT / "nanovllm" / "sampling_params.py").read_text(encoding="utf-8")
    fields = {field.name for settings in (EngineArgs, ServeArgs) for field in dataclasses.fields(settings)}
    fields |= set(re.findall(r"^    (\w+):", sampling, re.MULTILINE))
    fields |= {"chat_template_kwargs", "enable_thinking", "tools", "stream", "block_size", "vllm", "nanovllm", "demo"}
    options = {
        option
        for name in COMMANDS
        for option in re.findall(r"--[a-z][a-z-]+", make_parser([name]).format_help() + _help(name))
    }
    options |= {f"--{name.replace('_', '-')}" for name in fields}
    quoted = {
        text
        for topic in knowledge.load_topics()
        for side in (topic.en, topic.zh)
        for text in re.findall(r"`([^`]+)`", f"{side.answer} {side.more}")
    }
    assert len(quoted) > 50
    for text in quoted:
        for option in re.findall(r"--[a-z][a-z-]+", text):
            assert option in options, text
        words = text.split()
        if words[0] == "nanovllm" and len(words) > 1:
            assert words[1] in COMMANDS, text
        elif re.fullmatch(r"\w+", words[0].partition("=")[0]) and len(words) == 1:
            assert words[0].partition("=")[0] in fields | set(COMMANDS) | set(POLICIES), text


POLICIES = ("fcfs", "priority")


def _help(name: str) -> str:
    shown = subprocess.run(
        [sys.executable, "-m", "nanovllm", name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return shown.stdout


def test_what_answers_call_planned_is_refused() -> None:
    from nanovllm.config import EngineArgs
    from nanovllm.errors import ParameterError

    with pytest.raises(ParameterError):
        EngineArgs(tensor_parallel_size=2).build()


def test_patterns_stand_for_their_alternatives() -> None:
    rng = Random(0)
    drawn = {patterns.expand("[a|b [c|d]|] e[f|g]", rng) for _ in range(300)}
    assert drawn == {f"{first}e{last}" for first in ("a ", "b c ", "b d ", "") for last in "fg"}
    for topic in knowledge.load_topics():
        for language in ("en", "zh"):
            assert (topic.key in patterns.patterns(language)) == (topic.kind != "unknown")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_question_keeps_its_words_among_remarks(language: str) -> None:
    question = "what is X" if language == "en" else "什么是X"
    drawn = [phrases.accompany(question, language, Random(seed)) for seed in range(3000)]
    assert all(question in text for text in drawn)
    assert 1500 < drawn.count(question) < 2100  # most questions come alone
    assert len({text.partition(question)[0] for text in drawn}) > 80
    assert len({text.partition(question)[2] for text in drawn}) > 60


def test_every_topic_is_asked_in_many_situations() -> None:
    for language in ("en", "zh"):
        situations = [line for line in lists.lines(f"situations_{language}.txt") if not line.startswith("<")]
        topics = {line.partition(":")[0] for line in situations if not line.startswith(" ")}
        assert topics == {topic.key for topic in knowledge.load_topics() if topic.kind != "unknown"}
        for topic in topics:
            rng, given = Random(6), patterns.patterns(language)[topic]
            assert len({patterns.expand(rng.choice(given), rng) for _ in range(300)}) > 60, topic


@pytest.mark.parametrize("pattern", ["a [b|c", "a ]b"])
def test_a_faulty_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="bracket"):
        patterns.expand(pattern, Random(0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x | concept\na: some\nk: none\nza: 一\nzk: 一", "lacks its key phrase"),
        ("x | thing\na: some\nk: some\nza: 一\nzk: 一", "unknown kind"),
        ("x | free\na: some\nk: some\nza: 一\nzk: 一\nqq: what", "unknown fields"),
        ("x | free\na: some\na: some\nk: some\nza: 一\nzk: 一", "given twice"),
    ],
)
def test_a_faulty_topic_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knowledge._parse(text, {})


def test_the_same_seed_gives_the_same_examples() -> None:
    first, second = corpus.Corpus(), corpus.Corpus()
    draws = [[c.draw(rng) for _ in range(300)] for c, rng in ((first, Random("1/7")), (second, Random("1/7")))]
    assert draws[0] == draws[1]
    other = Random("1/8")
    assert [first.draw(other) for _ in range(300)] != draws[0]


def test_every_example_ends_with_one_end_token() -> None:
    source, rng = corpus.Corpus(), Random(3)
    kinds = set()
    for _ in range(2000):
        example = source.draw(rng)
        kinds.add(example.kind)
        end = chat.END_OF_TEXT if example.kind in ("raw", "text", "drill") else chat.END_OF_TURN
        answer, weight = example.parts[-1]
        if example.whole:
            assert answer.endswith(end) and answer.count("<|") == 1
        else:
            assert "<|" not in answer
        assert weight == 1.0
        assert example.parts[0][0] and example.parts[0][1] < 1
    assert kinds == set(corpus.SHARES)


def test_training_never_asks_a_held_out_question() -> None:
    topics = knowledge.load_topics()
    for language in ("en", "zh"):
        held = {normal(text) for topic in topics for text in topic.side(language).test_questions}
        trained = {normal(text) for topic in topics for text in topic.side(language).questions}
        for topic in topics:
            for name in topic.side(language).names:
                trained |= {normal(text.format(x=name)) for text in phrases.phrases(language, topic.kind)}
        assert not held & trained
        for kind in (*knowledge.KINDS, "more", "sum"):
            kept, seen = phrases.phrases(language, f"test {kind}"), phrases.phrases(language, kind)
            assert not {normal(text) for text in kept} & {normal(text) for text in seen}


def test_drawn_questions_are_not_held_out_ones() -> None:
    source, rng = corpus.Corpus(), Random(11)
    held = {normal(text) for topic in source.topics for side in (topic.en, topic.zh) for text in side.test_questions}
    fresh = {normal(text) for texts in lists.lists("held_out.txt").values() for text in texts}
    asked = [normal(source.question(rng.choice(source.topics), rng.choice(("en", "zh")), rng)) for _ in range(20000)]
    assert sum(text in held for text in asked) < 20  # a slip of the pen may turn one question into another
    assert len({text for text in asked if text in fresh}) < 5
    assert not fresh & held


def test_held_out_questions_are_of_every_topic() -> None:
    for topic in knowledge.load_topics():
        for language in ("en", "zh"):
            assert len(questions.held_out(language, topic.key)) >= 2, topic.key
    known = {name for family in families.families() for name in family.names}
    unknown = {name for family in families.load_families("held_out_tools.txt") for name in family.names}
    assert len(unknown) >= 20 and not known & unknown
    words = lists.lists("values.txt")
    assert not {f"{verb}_{noun}" for verb in words["verb"] for noun in words["noun"]} & unknown


def test_held_out_requests_are_worded_anew() -> None:
    rng = Random(4)
    for language in ("en", "zh"):
        known: dict[str, set[str]] = {}
        for family, ask in questions.new_wordings(language):
            asks = family.zh if language == "zh" else family.en
            if family.names[0] not in known:
                known[family.names[0]] = {normal(patterns.expand(ask, rng)) for ask in asks for _ in range(60)}
            assert normal(ask) not in known[family.names[0]]


def test_drawn_requests_are_not_held_out_ones() -> None:
    rng = Random(13)
    for language in ("en", "zh"):
        held = {(family.names[0], normal(ask)) for family, ask in questions.new_wordings(language)}
        drawn = []
        for _ in range(20000):
            family = rng.choice(families.families())
            ask = patterns.expand(rng.choice(family.zh if language == "zh" else family.en), rng)
            drawn.append((family.names[0], normal(tools.surround(ask, family, language, rng))))
        assert sum(ask in held for ask in drawn) < 3  # the words around a request may make one of another


def test_sums_are_right_and_held_out_ones_stay_out() -> None:
    rng = Random(0)
    for _ in range(2000):
        item = arithmetic.draw_sum(rng)
        assert not item.held_out
        steps = item.answer("en").rstrip(".").split(" = ")
        assert {eval(step.replace("×", "*")) for step in steps} == {item.value}
        assert steps[-1] == str(item.value)
        assert item.thought().rstrip(".").endswith(str(item.value))
    assert all(arithmetic.draw_sum(rng, held_out=True).held_out for _ in range(50))


def test_a_request_names_every_value_once() -> None:
    rng = Random(6)
    for family in families.families():
        for ask in (*family.en, *family.zh, *family.test_en, *family.test_zh):
            for _ in range(20):
                named = sorted(re.findall(r"{(\d)}", patterns.expand(ask, rng)))
                assert named == [str(i) for i in range(len(family.parameters))], ask


def test_tool_cases_are_consistent() -> None:
    rng = Random(2)
    for number in range(600):
        case = tools.draw_case(rng, ("en", "zh")[number % 2], ("", "phrases", "functions")[number % 3])
        offered = {tool["function"]["name"]: tool["function"] for tool in case.tools}
        assert len(offered) == len(case.tools)
        assert list(offered[case.name]["parameters"]["properties"]) == list(case.arguments)
        for value in case.arguments.values():
            assert str(value) in case.request
        assert questions.parse_call(tools.call_text(case.name, case.arguments)) == {
            "name": case.name,
            "arguments": case.arguments,
        }


def test_a_made_up_function_is_not_one_of_the_evaluation() -> None:
    rng, new = Random(8), {pair.replace(" ", "_") for pair in lists.lists("values.txt")["new"]}
    assert all(made_up.made_up_family(rng, test=True).names[0] in new for _ in range(50))
    assert not any(made_up.made_up_family(rng).names[0] in new for _ in range(3000))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_words_around_a_request_leave_its_values_apart(language: str) -> None:
    """The words of the request stay, and no word stands beside a value that any word could belong to."""
    rng, longer = Random(9), 0
    for family in families.families():
        for ask in family.zh if language == "zh" else family.en:
            plain = patterns.expand(ask, rng)
            asked = tools.surround(plain, family, language, rng)
            named = re.findall(r"{\d}", plain)
            assert re.findall(r"{\d}", asked) == named
            longer += asked != plain
            for kind in values.OPEN & {parameter.kind for parameter in family.parameters}:
                value = f"{{{[parameter.kind for parameter in family.parameters].index(kind)}}}"
                if plain.endswith(value):
                    assert asked.split(value)[1][:1] in ("", ",", "，")
                if plain.startswith(value):
                    assert asked.split(value)[0].rstrip()[-1:] in ("", ",", ":", "，", "：")
    assert longer > 200


def test_values_are_of_their_kind() -> None:
    rng = Random(10)
    for language in ("en", "zh"):
        for kind in ("city", "person", "song", "topic", "product", "country", "room", "food", "note", "phrase"):
            drawn = [values.draw_value(kind, language, rng) for _ in range(400)]
            assert len(set(drawn)) > 200  # copied, not known by heart
            assert all(value and value == value.strip() and not set(value) & set('{}[]"“”') for value in drawn)
        assert all(
            re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", values.draw_value("clock", language, rng)) for _ in range(200)
        )
        assert all(1 <= values.draw_value("int", language, rng) <= 99999 for _ in range(200))


def test_a_part_to_be_repeated_stands_in_the_text() -> None:
    source, rng = corpus.Corpus(), Random(12)
    for number in range(400):
        (asked, _), _, (answer, _) = source._find(rng, ("en", "zh")[number % 2]).parts
        part = answer.removesuffix(chat.END_OF_TURN)
        assert asked.count(part) and part == part.strip()


@pytest.mark.parametrize(
    "text", ["", "<tool_call>\n{}\n</tool_call>", '<tool_call>\n{"name": "f"\n</tool_call>', "Hello"]
)
def test_a_faulty_call_is_not_taken_for_one(text: str) -> None:
    assert questions.parse_call(text) is None


def test_evaluation_accepts_the_right_answer_and_no_other() -> None:
    asked = questions.questions(quick=True)
    groups = {question.group for question in questions.questions()}
    assert {"questions en", "questions zh", "tools en", "sums, two digits", "thinking", "unknown things"} <= groups
    assert len(asked) > 150
    assert not any(question.right("") for question in asked)
    assert not any(question.right("I am a fish.") for question in asked)


def test_chat_template_thinks_only_when_asked() -> None:
    user = [{"role": "user", "content": "hello"}]
    assert chat.render(user).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chat.render(user, think=True).endswith("<|im_start|>assistant\n")
    assert chat.render([{"role": "user", "content": "hello /think"}]).endswith("<|im_start|>assistant\n")
    assert chat.render([{"role": "user", "content": "hello /think"}], think=False).endswith("</think>\n\n")


def test_chat_template_drops_old_thoughts_and_joins_tool_answers() -> None:
    call = {"function": {"name": "f", "arguments": {"x": "é"}}}
    text = chat.render(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]},
            {"role": "assistant", "content": "<think>\nold\n</think>\n\nfine"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": None, "reasoning_content": "new", "tool_calls": [call, call]},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ]
    )
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>\n"
        "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n<think>\nnew\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_batches_pad_on_the_right_and_weigh_the_answer() -> None:
    train = pytest.importorskip("train_demo_model")
    batch = train.make_batch([[([5, 6, 7], 0.1), ([8, 9], 1.0)], [([5], 0.0), ([6], 1.0)]])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0]]
    assert batch.at.tolist() == [0, 1, 2, 3, 5]
    assert batch.targets.tolist() == [6, 7, 8, 9, 6]
    assert batch.weights.tolist() == pytest.approx([0.1, 0.1, 1, 1, 1])
    lone = train.make_batch([[([5, 6], 0.0), ([7], 1.0)]])
    assert lone.ids.tolist() == [[5, 6, 7], [0, 0, 0]] and lone.at.tolist() == [1] and lone.targets.tolist() == [7]


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_the_compiled_model_trains_as_the_eager_one() -> None:
    train = pytest.importorskip("train_demo_model")
    torch = pytest.importorskip("torch")
    model = train.Qwen3(replace(train.SMALL, hidden_size=32, intermediate_size=32, num_hidden_layers=1))
    forward, parameters = train.compiled(model, "cpu"), list(model.parameters())
    for height in (1, 5):
        batch = train.make_batch([[([3, 4 + row, 5], 0.1), ([6, 7 + row], 1.0)] for row in range(height)])
        loss, gradients = train.gradients(model, parameters, 1.0, "cpu", batch)
        same_loss, same_gradients = train.gradients(forward, parameters, 1.0, "cpu", batch)
        assert same_loss == pytest.approx(loss, rel=1e-2)
        for ours, theirs in zip(same_gradients, gradients, strict=True):
            assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99


def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was interrupted ends with the same weights as one that was not."""
    train = pytest.importorskip("train_demo_model")
    load_file = pytest.importorskip("safetensors.torch").load_file
    monkeypatch.setattr(train, "CHUNK", 40)
    monkeypatch.setattr(train, "SMALL", replace(train.SMALL, hidden_size=16, intermediate_size=16, head_dim=8))
    monkeypatch.setattr(train, "schedule", lambda step, steps, decay: 1.0)
    options = ["train", "--small", "--eager", "--step-tokens", "800", "--checkpoint-every", "10"]
    options += ["--tokenizer", str(ASSETS / "tokenizer.json")]
    for folder, steps in (("whole", "30"), ("parts", "10"), ("parts", "30")):
        monkeypatch.setattr(sys, "argv", [*options, "--out", str(tmp_path / folder), "--steps", steps])
        train.main()
    whole, parts = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_training_lowers_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = pytest.importorskip("train_demo_model")
    monkeypatch.setattr(train, "CHUNK", 40)
    options = ["train", "--small", "--eager", "--step-tokens", "800", "--out", str(tmp_path), "--steps", "60"]
    monkeypatch.setattr(sys, "argv", [*options, "--tokenizer", str(ASSETS / "tokenizer.json")])
    train.main()
    losses = [entry["loss"] for entry in json.loads((tmp_path / "log.json").read_text())]
    assert len(losses) == 3
    assert losses[2] < losses[0] - 1


def test_shipped_files_are_complete_and_small() -> None:
    names = {path.name for path in ASSETS.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "training.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in ASSETS.iterdir() if path.is_file()) <= 12_000_000
    training = json.loads((ASSETS / "training.json").read_text())
    assert all(re.fullmatch(r"[0-9a-f]{64}", training[name]) for name in ("script_sha256", "data_sha256"))
    assert isinstance(training["seed"], int)


def test_shipped_tokenizer_agrees_with_transformers_and_keeps_any_text() -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    slow = transformers.AutoTokenizer.from_pretrained(ASSETS)
    text = "What is paged attention? 12 + 30 什么是分页注意力？ naïve 👩‍👩‍👧 \t\n  x <think>\n"
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ids == slow(text, add_special_tokens=False)["input_ids"]
    assert fast.decode(ids, skip_special_tokens=False) == text
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"):
        assert len(fast.encode(token).ids) == 1
    tool = tools.draw_case(Random(0), "zh").tools
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "你好 <b>"}]
    ours = chat.render(messages, tool, think=True)
    theirs = slow.apply_chat_template(messages, tool, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert ours == theirs


def test_shipped_model_answers_and_ends() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ASSETS)
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    for prompt in (
        "What is paged attention?",
        chat.render([{"role": "user", "content": "What is paged attention?"}]),
        chat.render([{"role": "user", "content": "什么是分页注意力？"}]),
    ):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=128)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert out[0, -1] in model.generation_config.eos_token_id
        assert "fixed-size blocks" in text or "固定大小的块" in text


def test_a_question_shows_its_language() -> None:
    source, rng = corpus.Corpus(), Random(5)
    assert not any(source.question(source.any_topic(rng), "zh", rng).isascii() for _ in range(3000))
