import re
import tomllib
from pathlib import Path

import pytest

from lib.settings import CHOICES, PRESETS, SettingsError, load_settings

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
    plain, changed = load_settings("smoke"), load_settings("smoke", 0, "training.student_steps=7,network.student_channels=level+short")
    assert plain.digest() != changed.digest() and plain.digest() == load_settings("smoke").digest()
    assert changed.training.student_steps == 7 and changed.network.student_channels == ("level", "short")
    assert changed.channel == plain.channel


def test_choices_name_real_options():
    assert set(CHOICES) <= set(load_settings().options())


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_equals_pyproject(project):
    lines = [line.strip()[2:] for line in (ROOT / "environment.yml").read_text().splitlines() if line.strip().startswith("- ")]
    pip = [line for line in lines[lines.index("pip:") + 1 :] if not line.startswith("-e")]
    assert [line.split(" #")[0] for line in pip] == project["dependencies"] + project["optional-dependencies"]["distributed"]
    assert f"python{project['requires-python']}" in {line.split(" #")[0] for line in lines}
    assert all(" # " in line for line in lines if not line.startswith(("-e", "pip:"))), "every package says why it is here"


def test_the_tests_bring_all_that_they_need(project):
    extras = project["optional-dependencies"]
    assert set(extras["distributed"]) <= set(extras["test"]), "or the tests of two processes are skipped without a word"
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+]+", line)], "a name and a version, no path of one machine"
    locked = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    named = project["dependencies"] + [name for extra in ("test", "distributed", "generators") for name in extras[extra]]
    assert {re.split("[<>=]", name)[0].lower() for name in named} <= locked
