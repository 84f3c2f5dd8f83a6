"""`longvita config`: names, files and run directories; unknown keys name the nearest known one."""

import json

import pytest

import longvita as package
from longvita.cli.config import differences, flatten
from longvita.cli.run_config import RunConfig, UsageError, parse_model


@pytest.fixture
def run_json(tmp_path):
    """A valid run configuration as a dict, and a function that writes it (or a changed one) to a file."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    data = {
        "model": "tiny",
        "recipe": {"stage": 2, "steps": 20, "sequence_length": 512, "global_batch": 1},
        "data": [{"path": "train.jsonl", "ratio": 0.5, "num": 10}],
    }

    def write(**changes):
        merged = {key: value for key, value in {**data, **changes}.items() if value is not None}
        (tmp_path / "run.json").write_text(json.dumps(merged))
        return tmp_path / "run.json"

    return write


def test_show_a_model_with_what_follows_from_it(longvita):
    result = longvita("config", "show", "14b")
    assert package.LongVitaConfig.from_dict(json.loads(result.out)) == package.presets["14b"]
    assert "15,083,491,328 parameters" in result.err and "196,608 bytes per token" in result.err
    assert longvita("config", "show", "14b", "--quiet").err == ""


def test_show_a_recipe_and_a_file(longvita, tmp_path):
    assert json.loads(longvita("config", "show", "stage4").out)["sequence_length"] == 2**20
    (tmp_path / "config.json").write_text('{"model": {}}')
    assert json.loads(longvita("config", "show", tmp_path).out) == {"model": {}}
    assert json.loads(longvita("config", "show", tmp_path / "config.json").out) == {"model": {}}


def test_show_an_unknown_name(longvita):
    result = longvita("config", "show", "stage5")
    assert result.code == 2
    assert "'stage5' is no file and no known name; did you mean 'stage" in result.err


def test_diff(longvita):
    result = longvita("config", "diff", "stage3", "stage4")
    assert result.code == 0
    assert "sequence_length: 131072 → 1048576" in result.out.splitlines()
    assert not any(line.startswith("trainable") for line in result.out.splitlines())
    assert longvita("config", "diff", "tiny", "tiny").out == ""


def test_differences_of_keys_that_only_one_has():
    assert list(differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 2}, "d": None})) == ["a.b: 1 → 2", "c: [1] → (none)", "d: (none) → null"]
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}


def test_check_a_run_config(longvita, run_json):
    path = run_json()
    result = longvita("config", "check", path)
    assert result.code == 0
    assert result.out == f"{path}: ok: a model of 978,624 parameters, stage2: 20 steps of 1 × 512 tokens\n"


def test_a_run_config_is_read_completely(run_json, tmp_path):
    config = RunConfig.load(run_json(window=8, on_error="skip", media_root=".", model={"preset": "tiny", "text": {"num_layers": 2}}))
    assert config.recipe.steps == 20 and config.recipe.name == "stage2" and config.recipe.vision_lr_scale == 0.1
    assert config.data[0].path == tmp_path / "train.jsonl" and config.data[0].ratio == 0.5 and config.data[0].num == 10
    assert config.model.text.num_layers == 2 and config.model.text.hidden_size == package.presets["tiny"].text.hidden_size
    assert (config.window, config.on_error, config.media_root) == (8, "skip", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "tiny"}, r"unknown key 'modle'; did you mean 'model'\?"),
        ({"model": "tyni"}, r"unknown model preset 'tyni'; did you mean 'tiny'\?"),
        ({"model": {"preset": "tiny", "text": {"num_layer": 2}}}, r"unknown config key text.num_layer; did you mean 'num_layers'\?"),
        ({"model": 3}, "expected a preset's name or an object, got 3"),
        ({"model": None}, 'give either "model" .* or "init" .*, got neither'),
        ({"init": "."}, "got both"),
        ({"recipe": None}, "the key 'recipe' is missing"),
        ({"recipe": {"stage": 7}}, '"stage": one of 1, 2, 3, 4'),
        ({"recipe": {"stage": 1, "step": 5}}, r"unknown recipe field 'step'; did you mean 'steps'\?"),
        ({"data": []}, "expected a list"),
        ({"data": [{"path": "nowhere.jsonl"}]}, "nowhere.jsonl does not exist; relative paths start at the config file's folder"),
        ({"data": [{"path": "train.jsonl", "raito": 1}]}, r"unknown key 'raito'; did you mean 'ratio'\?"),
        ({"data": [{"path": "train.jsonl", "ratio": 0}]}, "ratio must be a number above 0, got 0"),
        ({"data": [{"path": "train.jsonl", "num": 1.5}]}, "num must be a whole number of at least 1, got 1.5"),
        ({"tokenizer": "t.json"}, "tokenizer: .*t.json does not exist"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"on_error": "ignore"}, "on_error must be 'strict' .* or 'skip' .*, got 'ignore'"),
    ],
)
def test_mistakes_in_a_run_config(run_json, longvita, changes, message):
    path = run_json(**changes)
    with pytest.raises(UsageError, match=message) as caught:
        RunConfig.load(path)
    assert str(caught.value).startswith(str(path))
    result = longvita("config", "check", path)
    # Without recipe, data and init it is taken for a model's file, which has its own message.
    assert result.code == 2 and result.err.startswith("longvita config: ")


@pytest.mark.parametrize(
    ("text", "message"), [("{", "expected JSON"), ("[]", "expected a JSON object with keys, got list"), (None, "no such file")]
)
def test_files_that_are_no_configuration(tmp_path, longvita, text, message):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    result = longvita("config", "check", path)
    assert result.code == 2 and message in result.err


def test_check_a_model_file_and_a_run_directory(longvita, tmp_path, tiny_run):
    package.presets["1b"].save(tmp_path / "model.json")
    assert "ok: a model of" in longvita("config", "check", tmp_path / "model.json", tiny_run / "stage4").out
    (tmp_path / "model.json").write_text('{"txt": {}}')
    result = longvita("config", "check", tmp_path / "model.json")
    assert result.code == 2 and "did you mean 'text'?" in result.err


def test_a_whole_model_without_a_preset():
    assert parse_model({}) == package.presets["14b"]
