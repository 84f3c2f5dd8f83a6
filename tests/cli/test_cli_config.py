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
        ({"recipe": {"stage": []}}, '"stage": one of 1, 2, 3, 4'),
        ({"recipe": {"stage": True}}, '"stage": one of 1, 2, 3, 4'),
        ({"recipe": {"stage": 1, "trainable": 5}}, "Recipe.trainable: expected parts out of vision, projector, text; got 5"),
        ({"recipe": {"stage": 1, "trainable": [[]]}}, "Recipe.trainable: expected parts"),
        ({"recipe": {"stage": 1, "name": 5}}, "Recipe.name: expected a text; got 5"),
        ({"model": {"preset": []}}, r"unknown model preset \[\]\. Known: tiny"),
        ({"model": None, "init": 5}, "init: expected a path as text, got 5"),
        ({"media_root": ["."]}, "media_root: expected a path as text"),
        ({"processor": 5}, "processor: expected an object such as"),
        ({"processor": {"max_tile": 4}}, r"unknown key 'max_tile'; did you mean 'max_tiles'\?"),
        ({"processor": {"max_tiles": 0}}, "max_tiles must be a whole number of at least 1, got 0"),
        ({"processor": {"max_fps": "2"}}, "max_fps must be a number of frames per second above 0, got '2'"),
        ({"processor": {"limits": {"root": "/"}}}, "processor.limits: unknown key 'root'"),
        ({"processor": {"limits": {"max_second": 5}}}, r"did you mean 'max_seconds'\?"),
        ({"processor": {"limits": {"max_seconds": -1}}}, "max_seconds must be a positive number, got -1"),
        ({"processor": {"limits": {"image_formats": 5}}}, "image_formats must be a list of names, got 5"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "unknown recipe field 'stepz'; did you mean 'steps'?"),
        ({"steps": None}, "missing: steps"),
        (5, "recipe: expected an object with keys; got 5"),
    ],
)
def test_check_a_run_directory_with_a_wrong_recipe(longvita, tmp_path, change, message):
    recipe = package.train.recipes.stage1().to_dict()
    recipe = {key: value for key, value in {**recipe, **change}.items() if value is not None} if isinstance(change, dict) else change
    (tmp_path / "config.json").write_text(json.dumps({"model": package.presets["tiny"].to_dict(), "recipe": recipe}))
    result = longvita("config", "check", tmp_path)
    assert result.code == 2 and message in result.err


def test_show_a_file_whose_model_is_no_object(longvita, tmp_path):
    (tmp_path / "x.json").write_text('{"model": 5}')
    assert longvita("config", "show", tmp_path / "x.json").code == 0


def test_the_media_folder_holds_all_jsonl_files_and_never_widens(run_json, tmp_path):
    for name in ("a", "b", "a/deep"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("{}\n")
    (tmp_path / "a" / "link.jsonl").symlink_to(tmp_path / "b" / "x.jsonl")
    assert RunConfig.load(run_json(data=["a/x.jsonl", "a/deep/x.jsonl"])).media_folder() == tmp_path / "a"
    assert RunConfig.load(run_json(data=["b/../a/x.jsonl", "a/link.jsonl"])).media_folder() == tmp_path / "a"
    assert RunConfig.load(run_json(data=["a/x.jsonl", "b/x.jsonl"], media_root=".")).media_folder() == tmp_path
    with pytest.raises(UsageError, match='the JSONL files lie in different folders: name the folder of their media with "media_root"'):
        RunConfig.load(run_json(data=["a/x.jsonl", "b/x.jsonl"]))


def test_a_whole_model_without_a_preset():
    assert parse_model({}) == package.presets["14b"]
