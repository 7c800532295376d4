import re
import tomllib
import typing
from pathlib import Path

import pytest

from lib.model.perturbations import KINDS
from lib.settings import PRESETS, RECIPES, Settings, SettingsError, load_settings, parse_options

ROOT = Path(__file__).parent.parent


def test_presets_load():
    for preset in PRESETS:
        assert load_settings(preset).preset == preset


@pytest.mark.parametrize(("options", "message"), [
    ("training.steps=4", "training.teacher_steps"),
    ("student_steps=4", "training.student_steps"),
    ("seeed=1", "'seed'"),
    ("run.seeds=x", "type int"),
    ("run.seeds=1.5", "type int"),
    ("channel.enabled=maybe", "type bool"),
    ("scoring.pooling=mode", "one of mean"),
    ("seed", "NAME=VALUE"),
])
def test_bad_options_name_what_is_right(options, message):
    with pytest.raises(SettingsError, match=message):
        load_settings("smoke", 0, options)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(SettingsError, match="'study'"):
        load_settings("studdy")


def test_options_change_the_digest_and_nothing_else():
    options = "training.student_steps=7,network.student_planes=level+short"
    plain, changed = load_settings("smoke"), load_settings("smoke", 0, options)
    assert plain.digest() != changed.digest() and plain.digest() == load_settings("smoke").digest()
    assert changed.training.student_steps == 7 and changed.network.student_planes == ("level", "short")
    assert changed.channel == plain.channel


def test_the_published_recipe_is_one_option_and_explicit_options_win():
    settings = load_settings("smoke", 0, "training.batch=4,recipe=stfpm")
    assert settings.title == "Feature pyramid matching (as published)" and settings.training.batch == 4
    published = {**RECIPES["stfpm"], "training.batch": 4}
    assert {name: settings.options()[name] for name in published} == published
    plain = load_settings("smoke").training
    for batch in (4, 32):
        training = load_settings("smoke", 0, f"recipe=stfpm,training.batch={batch}").training
        assert training.batch * training.student_steps == plain.batch * plain.student_steps, "as many crops in all"
    assert "recipe" in settings.options() and settings.digest() != load_settings("smoke").digest()
    assert load_settings("study", 0, "recipe=stfpm").with_options({"recipe": "readings"}) == load_settings("study")
    assert load_settings("smoke", 0, "recipe=readings") == load_settings("smoke")
    again = settings.with_options({"training.student_steps": 9})
    assert again.training.batch == 4, "a recipe that was chosen before brings nothing again"


def test_a_teacher_without_readers_is_scored_without_them():
    plain, random = load_settings("smoke"), load_settings("smoke", 0, "network.teacher=random")
    assert (random.scoring.scaling, random.scoring.pooling) == ("signed", "two_sided")
    assert random.with_options({"network.teacher": "perturbation"}) == plain
    assert load_settings("smoke", 0, "network.teacher=random,scoring.scaling=read").scoring.scaling == "read"
    chosen = load_settings("smoke", 0, "scoring.scaling=frequency,network.teacher=random")
    assert chosen.scoring.scaling == "frequency"
    signed = load_settings("smoke", 0, "scoring.scaling=signed,scoring.pooling=two_sided")
    assert signed.with_options({"run.seeds": 2}).scoring == signed.scoring


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_equals_pyproject(project):
    environment = (ROOT / "environment.yml").read_text().splitlines()
    lines = [line.strip()[2:] for line in environment if line.strip().startswith("- ")]
    pip = [line for line in lines[lines.index("pip:") + 1 :] if not line.startswith("-e")]
    stated = project["dependencies"] + project["optional-dependencies"]["distributed"]
    assert [line.split(" #")[0] for line in pip] == stated
    assert f"python{project['requires-python']}" in {line.split(" #")[0] for line in lines}
    packages = [line for line in lines if not line.startswith(("-e", "pip:"))]
    assert all(" # " in line for line in packages), "every package says why it is here"


def test_the_tests_bring_all_that_they_need(project):
    extras = project["optional-dependencies"]
    assert set(extras["distributed"]) <= set(extras["test"]), "or the tests of two processes are skipped without a word"
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    odd = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+]+", line)]
    assert not odd, "a name and a version, no path of one machine"
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    named = project["dependencies"] + [name for extra in ("test", "distributed", "generators")
                                       for name in extras[extra]]
    assert {re.split("[<>=]", name)[0].lower() for name in named} <= locked


def annotation(name):
    section, _, key = name.rpartition(".")
    owner = type(getattr(Settings(), section)) if section else Settings
    return typing.get_type_hints(owner, include_extras=True)[key]


def test_every_number_has_a_range():
    numbers = [name for name, value in Settings().options().items() if type(value) in (int, float)]
    assert len(numbers) > 30
    for name in numbers:
        if typing.get_origin(annotation(name)) is typing.Literal:
            continue
        _, (low, high) = typing.get_args(annotation(name))
        for value in (low - 1, high * 2 + 1, float("nan")):
            with pytest.raises(SettingsError, match=name):
                load_settings("smoke", 0, {name: value})


def test_every_choice_is_named():
    for name, value in Settings().options().items():
        if type(value) is str and name != "run.device":  # what there is depends on the machine
            assert value in typing.get_args(annotation(name))
    assert typing.get_args(annotation("training.without")) == ("", *KINDS)
    assert load_settings("smoke", 0, "network.stem=3,training.without=drift of phase").network.stem == 3


@pytest.mark.parametrize(("options", "words"), [
    ("network.stem=4", "'network.stem' is one of 1, 3, 5"), ("training.without=echo", "one of average of periods, "),
    ("data.min_s=9,data.max_s=3", "'data.min_s' has to be less than 'data.max_s'"),
    ("channel.low_hz=5000,channel.high_hz=300", "'channel.low_hz' has to be less than 'channel.high_hz'")])
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(SettingsError, match=words):
        load_settings("smoke", 0, options)
    assert load_settings("smoke", 0, "data.min_s=9,data.max_s=12").data.min_s == 9


@pytest.mark.parametrize(("texts", "options"), [
    ("", {}), ("seed=1", {"seed": "1"}), (" seed = 1 , run.seeds = 2,", {"seed": "1", "run.seeds": "2"}),
    (["seed=1,run.seeds=2", "run.threads=1"], {"seed": "1", "run.seeds": "2", "run.threads": "1"}),
    (["data.generators=world,hibari"], {"data.generators": "world,hibari"}),
    ("data.train=ljspeech:/a,b/c+vctk:/d,seed=3", {"data.train": "ljspeech:/a,b/c+vctk:/d", "seed": "3"})])
def test_one_parser_reads_options_of_command_and_notebooks(texts, options):
    assert parse_options(texts) == options
    joined = ",".join(f"{name}={value}" for name, value in options.items())
    assert parse_options(joined) == options, "what the command hands to a notebook"


@pytest.mark.parametrize(("texts", "message"), [
    (["seed"], "NAME=VALUE"), (["seed=1", "seed=2"], "'seed' is given twice"), ("seed=1,seed=1", "given twice")])
def test_options_that_are_none_or_given_twice_are_refused(texts, message):
    with pytest.raises(SettingsError, match=message):
        parse_options(texts)


def test_folders_of_corpora_may_hold_commas_and_plus_signs():
    settings = load_settings("smoke", 0,
                             "data.train=ljspeech:/a,b/c+d+vctk@train:/e,f+embedded,data.generators=world,hibari")
    assert settings.data.train == ("ljspeech:/a,b/c+d", "vctk@train:/e,f", "embedded")
    assert settings.data.generators == ("world", "hibari")


def test_the_preset_is_no_option():
    with pytest.raises(SettingsError, match="--preset"):
        load_settings("smoke", 0, "preset=study")
