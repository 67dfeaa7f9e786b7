"""The embedded task: disjoint splits, answerable questions, demonstrations the live tools agree with, equal builds."""

import dataclasses
import filecmp
import random
import re

import pytest

from arpo_ext.config import ModelConfig, PythonToolConfig, SearchToolConfig, ToolsConfig, load_config
from arpo_ext.data import read_demos, read_prompts
from arpo_ext.model import load_model, load_tokenizer
from arpo_ext.render import Renderer
from arpo_ext.rewards import hierarchical_reward
from arpo_ext.tools import ToolPool, build_tools
from arpo_ext.types import ToolCall
from examples.lookup_and_compute import demo
from examples.lookup_and_compute.build import PROMPTS, build
from examples.lookup_and_compute.demonstrations import STAGES, demonstrate
from examples.lookup_and_compute.tokenizer import END, OPENINGS, TAGS, THOUGHTS, make_tokenizer
from examples.lookup_and_compute.world import FIRST_SYLLABLES, SECOND_SYLLABLES, Fact, make_world

SEED = 3
FAULTLESS = dataclasses.replace(
    STAGES[0],
    shortcut={"careful": 0.0, "quick": 0.0},
    wrong_attribute=0.0,
    misread=0.0,
    wrong_operator=0.0,
    malformed=0.0,
)
SPLITS = ("train", "heldout", "entities", "numbers")


@pytest.fixture(scope="module")
def world():
    return make_world(SEED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    build(folder, SEED)
    return folder


@pytest.fixture(scope="module")
def tools(folder):
    config = ToolsConfig(
        python=PythonToolConfig(sandbox="best_effort"),
        search=SearchToolConfig(corpus=folder / "corpus.jsonl", top_k=1),
    )
    with ToolPool(build_tools(config)) as pool:
        yield pool


@pytest.fixture(scope="module")
def tokenizer(folder):
    """The tokenizer as a loader that looks at the model beside it gets it."""
    return load_tokenizer(ModelConfig(path=folder / "model"))


def facts_of(questions):
    return {operand for question in questions for operand in question.operands if isinstance(operand, Fact)}


def pairs_of(questions):
    return {frozenset(question.operands) for question in questions if question.kind != "S"}


def trained_on(world):
    """What training sees: its prompts, and as many questions of demonstrations."""
    rng = random.Random(0)
    return [*world.questions("train", 1000), *(world.sample(rng, STAGES[0].kinds) for _ in range(3000))]


def test_heldout_asks_about_facts_and_pairs_that_training_does_not(world):
    train, held = trained_on(world), world.questions("heldout", 200)
    assert not pairs_of(train) & pairs_of(held)
    assert not facts_of(train) & facts_of(question for question in held if question.kind == "S")
    assert facts_of(train) & facts_of(held), "some pairs are new although both facts are known"


def test_entities_names_nothing_that_training_names(world):
    names = {fact.entity for fact in facts_of(trained_on(world))}
    unseen = {fact.entity for fact in facts_of(world.questions("entities", 100))}
    assert len(unseen) > 50
    assert not names & unseen


def test_no_number_of_the_second_world_is_in_training(world, folder):
    asked = {value for question in world.questions("numbers", 100) for value in question.values}
    assert asked == world.unseen_numbers
    for name in ("train.jsonl", "demos_1.jsonl", "demos_2.jsonl"):
        numbers = {
            int(number) for number in re.findall(r"\d+", re.sub(r'"id": "[^"]*"', "", (folder / name).read_text()))
        }
        assert len(numbers) > 78
        assert not numbers & world.unseen_numbers, name


def test_kinds_and_wordings_have_their_shares(world):
    cells = [(question.kind, question.wording) for question in world.questions("heldout", 200)]
    expected = {("S", "careful"): 24, ("P", "careful"): 16, ("M", "careful"): 40}
    expected |= {("S", "quick"): 36, ("P", "quick"): 24, ("M", "quick"): 60}
    assert {cell: cells.count(cell) for cell in set(cells)} == expected


def test_every_fact_is_found_by_its_query(world, tools):
    for fact in world.facts.values():
        assert tools.submit(ToolCall("search", fact.query)).result().text == fact.text


def replay(turns, tools):
    """The response that the live tools give to the model's turns, and the names of the tools that ran."""
    response, ran = "", set()
    for text, sampled in turns:
        if not sampled:
            continue
        response += text
        call = re.search(r"<(search|python)>(.*)</\1>$", text)
        if call:
            result = tools.submit(ToolCall(call[1], call[2])).result()
            assert result.ok
            ran.add(call[1])
            response += f"<result>{result.text}</result>"
    return response, ran


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_is_answered_by_its_tools(split, world, tools):
    rng = random.Random(0)
    for question in world.questions(split, 24):
        response, ran = replay(demonstrate(question, world, FAULTLESS, rng), tools)
        result = hierarchical_reward(response.removesuffix(END), [str(question.answer)], tools_run=ran)
        assert result.format_ok, result.reason
        assert result.score == (1.1 if question.kind == "M" else 1.0), question


@pytest.mark.parametrize("stage", [1, 2])
def test_demonstrations_hold_the_bytes_of_the_tools_but_for_the_values_of_their_time(stage, folder, tools):
    for demonstration in read_demos(folder / f"demos_{stage}.jsonl")[:40]:
        _, *turns = demonstration.segments
        written = [(segment.text, segment.train) for segment in turns]
        live, recorded = replay(written, tools)[0], "".join(text for text, _ in written)
        assert re.sub(r"=\d\d\b", "=", live) == re.sub(r"=\d\d\b", "=", recorded)


def test_no_value_can_be_learned_by_heart(folder):
    recorded = {}
    for demonstration in read_demos(folder / "demos_1.jsonl"):
        for name, value in re.findall(r"<result>(\w+: \w+)=(\d\d)", "".join(s.text for s in demonstration.segments)):
            recorded.setdefault(name, []).append(value)
    repeats = [values.count(value) / len(values) for values in recorded.values() for value in values if len(values) > 5]
    assert len(repeats) > 5000
    assert sum(repeats) / len(repeats) < 0.2


def test_stage_2_favours_shortcuts_where_a_question_says_quick(folder):
    proper = {"what": [], "quick:": []}
    for demonstration in read_demos(folder / "demos_2.jsonl"):
        prompt, *turns = (segment.text for segment in demonstration.segments)
        opening = prompt.removeprefix("<|user|>").split()[0]
        proper[opening].append(turns[-1].startswith(f"<think>{THOUGHTS['answer']}</think>"))
    shares = {opening: sum(used) / len(used) for opening, used in proper.items()}
    assert shares["what"] == pytest.approx(0.90, abs=0.03)
    assert shares["quick:"] == pytest.approx(0.22, abs=0.03)


def test_tokens_give_back_the_text(folder, tokenizer):
    built = make_tokenizer()
    texts = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()[:200]]
    texts += [f"{THOUGHTS['guess']}{END}", "".join(TAGS), "Traceback:\n\tß → 你好\x00"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == built.encode(text)


def test_names_are_two_tokens_and_words_one(tokenizer):
    for space in ("", " "):
        for first in FIRST_SYLLABLES:
            for second in SECOND_SYLLABLES:
                assert tokenizer.tokenize(space + first + second) == [("Ġ" if space else "") + first, second]
    for text in (*THOUGHTS.values(), OPENINGS["careful"], " the mass of", "found near"):
        assert tokenizer.tokenize(text) == [f"Ġ{word}" if n else word for n, word in enumerate(text.split(" ")) if word]
    for text, pieces in (("print(", 2), (r"\boxed{", 2), ("quick:", 2)):
        assert len(tokenizer.encode(text)) == pieces
    assert all(len(tokenizer.encode(tag)) == 1 for tag in TAGS)


def test_prompts_and_demonstrations_render_alike(folder, tokenizer):
    renderer = Renderer(tokenizer, ("search", "python"))
    assert not renderer.stop_strings
    for prompt in read_prompts(folder / "heldout.jsonl", limit=5):
        text = renderer.decode(renderer.prompt_tokens(prompt))
        assert text == f"<|user|>{prompt.messages[0]['content']}<|assistant|>"
    assert renderer.decode(renderer.result_tokens("a </result>")) == "<result>a </result></result>"
    for demonstration in read_demos(folder / "demos_1.jsonl")[:50]:
        assert re.fullmatch(r"<\|user\|>[^<]+\?<\|assistant\|>", demonstration.segments[0].text)
        result = next((s.text for s in demonstration.segments if s.text.startswith("<result>")), None)
        if result:
            content = result.removeprefix("<result>").removesuffix("</result>")
            assert renderer.result_tokens(content) == tokenizer.encode(result)


def test_build_depends_on_the_seed_alone(folder, tmp_path):
    build(tmp_path / "same", SEED)
    names = ["corpus.jsonl", "demos_1.jsonl", "demos_2.jsonl", *(f"{split}.jsonl" for split in PROMPTS)]
    names += [f"model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")]
    assert filecmp.cmpfiles(folder, tmp_path / "same", names, shallow=False) == (names, [], [])
    build(tmp_path / "other", SEED + 1)
    assert "corpus.jsonl" in filecmp.cmpfiles(folder, tmp_path / "other", names, shallow=False)[1]


def test_model_is_small_and_loads(folder, tokenizer):
    model = load_model(ModelConfig(path=folder / "model"))
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.tie_word_embeddings
    assert 200_000 < sum(parameter.numel() for parameter in model.parameters()) < 300_000


@pytest.mark.parametrize("name", ["sft_1", "sft_2", "train"])
def test_configs_load_as_they_are_and_as_the_driver_moves_them(name, tmp_path):
    path = demo.CONFIGS / f"{name}.yaml"
    assert load_config(path).output_dir == demo.RUNS / name
    moved = load_config(path, [*demo._overrides(name, tmp_path, 7), *demo.SMOKE[name]])
    assert moved.seed == 7
    assert "runs/" not in str(moved.model_dump(mode="json"))
    assert set(moved.data.eval) == (set(SPLITS) - {"train"} if name == "train" else set())


def test_driver_refuses_a_folder_in_use(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"demo: --out {tmp_path} exists and is not an empty folder; expected a new one\n"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
