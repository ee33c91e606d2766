"""The commands as a user types them: results as JSON, bad input as one line and exit code 2."""

import importlib.util
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from rich.console import Console
from transformers import BertConfig, BertModel

import qbert
from qbert import cli, target
from qbert.cli import bench, terminal
from qbert.errors import QBertError


@dataclass
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def run(*arguments, check=True):
    """The command line in this process: a process of its own would spend seconds importing torch, every time."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["qbert", *map(str, arguments)]),
        mock.patch.object(terminal, "out", Console(width=160)),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
    done = Done(code, stdout.getvalue(), stderr.getvalue())
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A float BERT of two small layers, saved as transformers does."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(tiny, tmp_path_factory):
    """The same, quantized by the command."""
    folder = tmp_path_factory.mktemp("out") / "tiny-gobo3"
    report = json.loads(
        run("quantize", tiny, "--scheme", "gobo3", "--embedding", "gobo4", "-o", folder, "--json").stdout
    )
    return folder, report


def test_quantize_reports_what_it_wrote(quantized):
    folder, report = quantized
    assert report["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert report["modules"] == 2 * 6 + 1 + 3
    assert report["percent_of_float32"] < 25


def test_inspect_lists_every_linear_and_embedding(quantized):
    folder, _ = quantized
    report = json.loads(run("inspect", folder, "--json").stdout)
    schemes = {row["name"]: row["scheme"] for row in report["modules"]}
    assert schemes["encoder.layer.1.output.dense"] == "gobo3"
    assert schemes["embeddings.word_embeddings"] == "gobo4"
    assert len(schemes) == 16
    printed = run("inspect", folder).stdout
    assert "encoder.layer.0" in printed
    assert report["extensions"] == target.extensions()
    for extension, state in report["extensions"].items():
        assert f"{extension}: {state}" in printed


@pytest.fixture(scope="module")
def with_words(tiny, tmp_path_factory):
    """A float BERT with MiniLM's tokenizer beside it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "words"
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_quantize_fused_and_calibrated(with_words, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("one text\n\nanother text\n")
    for arguments, fused in (
        (["--fuse"], "dynamic"),
        (["--fuse", "--calibrate", "default"], "static"),
        (["--calibrate", lines], "static"),
    ):
        report = json.loads(run("quantize", with_words, *arguments, "-o", tmp_path / "out", "--json").stdout)
        assert [row["fused"] for row in report["encoders"]] == [fused]
        assert json.loads(run("inspect", tmp_path / "out", "--json").stdout)["encoders"][0]["fused"] == fused
        assert f"BertModel: fused: {fused} (" in run("inspect", tmp_path / "out").stdout
    done = run("analyze", tmp_path / "out", "--batch", 1, "--seq", 8, "--no-measure", "--target", "h100")
    assert "steps of the fused" in done.stdout
    unfused = run(
        "analyze", tmp_path / "out", "--batch", 1, "--seq", 8, "--no-measure", "--target", "h100", "--unfused"
    )
    assert "steps of the fused" not in unfused.stdout
    printed = run("quantize", with_words, "--fuse", "--scheme", "w8a16", "-o", tmp_path / "out").stdout
    assert "BertModel: fused: no (encoder.layer.0.attention.self.query has scheme w8a16" in printed


@pytest.mark.parametrize(
    ("model", "arguments", "fused", "says"),
    [
        (
            "with_words",
            [],
            "static",
            "calibrated on English prose, because that is faster; --calibrate TEXTS takes yours",
        ),
        (
            "with_words",
            ["--calibrate", "none"],
            "dynamic",
            "fused, because that is faster; --no-fuse leaves the modules",
        ),
        ("with_words", ["--no-fuse"], "no", ""),
        ("with_words", ["--scheme", "gobo4"], "no", "not fused: gobo4 has no int8 activations"),
        ("with_words", ["--emulate", "weights=mxfp4"], "no", ""),
        (
            "tiny",
            ["--scheme", "w4a8"],
            "dynamic",
            "not calibrated, which would be faster: no tokenizer beside the model",
        ),
    ],
)
def test_quantize_fuses_and_calibrates_where_that_pays(request, tmp_path, model, arguments, fused, says):
    source, out = request.getfixturevalue(model), tmp_path / "out"
    printed = run("quantize", source, *arguments, "-o", out).stdout
    assert says in printed
    assert ("--calibrate" in printed) == ("calibrated on" in says)
    assert json.loads(run("inspect", out, "--json").stdout)["encoders"][0]["fused"] == fused
    report = json.loads(run("quantize", source, *arguments, "-o", out, "--json").stdout)
    assert report["calibrated_with"] == ("default" if fused == "static" else None)
    assert any(says in note for note in report["notes"]) or not says


def test_compress_writes_a_smaller_model_and_explain_shows_its_shapes(with_words, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text(
        "\n".join(f"a text about the {word}" for word in ("sea", "sky", "wind", "rain") for _ in range(20))
    )
    common = ["--batch", 1, "--seq", 16, "--texts", lines, "-o", tmp_path / "out"]
    asked = ["--vocabulary", 4000, "--layers", 1, "--quantize", "w8a8"]
    report = json.loads(run("compress", with_words, *asked, *common, "--json").stdout)
    assert [step["method"] for step in report["report"]["steps"]][1:] == [
        "trim vocabulary", "drop layers", "quantize w8a8",
    ]  # fmt: skip
    assert report["file_bytes"] < report["float32_bytes"] / 4
    printed = run("explain", tmp_path / "out").stdout
    assert "compressed: 1 of 1 layers, heads 2 of 2, FFN 64 of 64, vocabulary 4,000 of 30,522" in printed
    assert "fused: static" in printed
    assert "compressed: 1 of 1 layers" in run("inspect", tmp_path / "out").stdout
    recipe = tmp_path / "small.toml"
    recipe.write_text("layers = 1\n")
    done = run("compress", with_words, "--recipe", recipe, *common)
    assert "drop layers" in done.stdout


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Enough labelled texts for a search: its methods, its judge and its test have some each."""
    file = tmp_path_factory.mktemp("texts") / "mine.tsv"
    words = [
        f"{first}{second}"
        for first in ("sea", "sky", "wind", "rain")
        for second in ("s", "-bird", "-side", "-blue", "-like")
    ]
    rows = [
        f"a {adjective} text about the {word}\t{adjective}"
        for word in words
        for adjective in ("good", "bad", "long", "new")
    ]
    rows += [row.replace("text", "book") for row in rows]
    file.write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return file


def test_compress_searches_and_leaves_its_report_beside_the_model(with_words, labelled, tmp_path):
    common = [
        "--data",
        labelled,
        "--max-drop",
        90,
        "--steps",
        "quantize",
        "--batch",
        1,
        "--seq",
        16,
        "-o",
        tmp_path / "out",
    ]
    printed = run("compress", with_words, "--smallest", *common).stdout
    assert "quantize w8a8" in printed
    assert "on test texts, which decided nothing: mine.tsv" in printed
    assert f"again: qbert compress {with_words} --smallest" in printed
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert report["met"]
    assert [row["kept"] for row in report["rows"]][:2] == [True, True]
    assert (tmp_path / "out" / "compression.png").stat().st_size > 10_000
    again = report["commands"][1].split()
    assert again[:3] == ["qbert", "compress", str(with_words)]
    again[again.index("OUT")] = tmp_path / "again"
    assert "quantize" in run(*again[1:]).stdout
    assert qbert.load(tmp_path / "out").config.vocab_size == qbert.load(tmp_path / "again").config.vocab_size


def test_a_search_that_fails_says_the_best_and_writes_nothing(with_words, labelled, tmp_path):
    common = [
        "--data",
        labelled,
        "--max-drop",
        90,
        "--steps",
        "quantize",
        "--batch",
        1,
        "--seq",
        16,
        "-o",
        tmp_path / "out",
    ]
    done = run("compress", with_words, "--speedup", 900, *common, check=False)
    assert done.returncode == 2
    assert "x900 of the float model's speed at a loss of at most 90 points cannot be met" in done.stderr
    assert done.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_advise_measures_every_method_where_a_goal_is_given(with_words, labelled):
    asked = ["advise", with_words, "--goal", "size", "--data", labelled, "--max-drop", 90, "--batch", 1, "--seq", 16]
    printed = run(*asked).stdout
    for said in (
        "quantize",
        "vocabulary",
        "not measured",
        "take quantize",
        "to run it: qbert compress",
        "as a recipe:",
    ):
        assert said in printed
    assert "layers" in printed  # it has one, of which none can go


def test_verify_measures_each_weight(quantized, tiny):
    folder, _ = quantized
    report = json.loads(run("verify", folder, "--against", tiny, "--json").stdout)
    assert len(report["sqnr"]) == 16
    assert all(10 < row["sqnr_db"] < 30 for row in report["sqnr"])
    assert "keep every rule" in run("verify", folder).stdout


def test_verify_names_what_a_flipped_bit_broke(quantized, tmp_path):
    folder, _ = quantized
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "model.safetensors").write_bytes(data)
    done = run("verify", broken, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: checkpoint: ")
    assert done.stderr.count("\n") == 1


def test_analyze_counts_without_measuring(quantized):
    folder, _ = quantized
    report = json.loads(
        run("analyze", folder, "--batch", 2, "--seq", 16, "--no-measure", "--target", "h100", "--json").stdout
    )
    assert report["batch"] == 2
    assert {row["component"] for row in report["components"]} >= {"embeddings"}


def test_advise_says_how_sure_it_is(tiny):
    advice = json.loads(run("advise", tiny, "--batch", 1, "--seq", 16, "--target", "h100", "--json").stdout)
    assert advice["best"] is None
    assert {option["basis"] for option in advice["options"]} <= {"measured", "interpolated", "linears", "roofline"}
    printed = run("advise", "base", "--batch", 64, "--seq", 128, "--target", "a100").stdout
    assert "at most" in printed
    assert "NVIDIA A100" in printed


def test_bench_hands_its_arguments_to_each_benchmark():
    printed = run("bench", "gemm", "--predict", "--target", "h100", "--model", "base", "--tokens", 64).stdout
    assert "computed, not measured" in printed
    listed = run("bench", "--help").stdout
    for name, (module, _) in bench.BENCHMARKS.items():
        assert name in listed
        assert importlib.util.find_spec(f"qbert.benchmarks.{module}") is not None
    assert "--predict" in run("bench", "gemm", "--help").stdout
    done = run("bench", "gemm", "--nonsense", check=False)
    assert done.returncode == 2
    assert "--nonsense" in done.stderr


def test_no_benchmark_is_imported_before_it_is_asked_for():
    code = "import qbert.cli, sys; print([name for name in sys.modules if name.startswith('qbert.benchmarks')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_formats_lists_all_schemes():
    from qbert.formats import FORMATS, SCHEMES

    listed = json.loads(run("formats", "--json").stdout)
    assert [row["scheme"] for row in listed["schemes"]] == list(SCHEMES)
    assert [row["format"] for row in listed["formats"]] == list(FORMATS)


def test_formats_shows_one_whole():
    shown = run("formats", "--show", "nvfp4", "--show", "gobo3").stdout
    assert "-6 -4 -3 -2 -1.5 -1 -0.5 0 0.5 1 1.5 2 3 4 6" in shown
    assert "16 x 4 + 8 = 72" in shown
    assert "learned from each matrix" in shown
    assert json.loads(run("formats", "--show", "mxint8", "--json").stdout)[0]["largest"] == 1.984375


def test_an_emulated_folder_is_a_checkpoint_like_any_other(tiny, tmp_path):
    out = tmp_path / "emulated"
    report = json.loads(
        run("quantize", tiny, "--emulate", "weights=mxfp4 activations=mxfp8", "-o", out, "--json").stdout
    )
    assert report["bits_per_weight"] == 4.25
    inspected = json.loads(run("inspect", out, "--json").stdout)
    assert {row["kernel"] for row in inspected["modules"] if row["scheme"] == "mxfp4/mxfp8"} == {"emulated"}
    assert all(
        row["sqnr_db"] > 10 for row in json.loads(run("verify", out, "--against", tiny, "--json").stdout)["sqnr"]
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["quantize", "{tiny}", "--scheme", "gobo5", "-o", "{out}"], "gobo5"),
        (["quantize", "{tiny}", "--scheme", "w4a8-g128", "-o", "{out}"], "64"),
        (["quantize", "{tiny}", "--override", "nothing.here=w8a8", "-o", "{out}"], "nothing.here"),
        (["quantize", "{tiny}", "--override", "half", "-o", "{out}"], "half"),
        (["quantize", "{out}/missing", "-o", "{out}"], "missing"),
        (["quantize", "{tiny}", "--no-fuse", "--calibrate", "default", "-o", "{out}"], "--fuse"),
        (["quantize", "{tiny}", "--fuse", "--calibrate", "nonsense", "-o", "{out}"], "nonsense"),
        (["quantize", "{tiny}", "--fuse", "--calibrate", "none.tsv", "-o", "{out}"], "none.tsv"),
        (["quantize", "{tiny}", "--fuse", "--calibrate", "lee", "-o", "{out}"], "lee"),
        (["quantize", "{quantized}", "-o", "{out}"], "quantized already"),
        (["compress", "{tiny}", "--texts", "default", "-o", "{out}/new"], "nothing to do"),
        (["compress", "{tiny}", "--layers", "1", "-o", "{out}/new"], "no --texts"),
        (["compress", "{tiny}", "--max-drop", "1", "-o", "{out}/new"], "nothing to search by"),
        (["compress", "{tiny}", "--max-drop", "1", "--task", "trec", "-o", "{tiny}"], "holds no qbert checkpoint"),
        (["compress", "{tiny}", "--max-drop", "1", "--layers", "1", "-o", "{out}/new"], "--layers: a search"),
        (["compress", "{tiny}", "--goal", "speed", "--task", "trec", "-o", "{out}/new"], "goal 'speed'"),
        (["compress", "{tiny}", "--goal", "latency", "--smallest", "--task", "trec", "-o", "{out}/new"], "one of them"),
        (["compress", "{tiny}", "--steps", "layers", "--texts", "default", "-o", "{out}/new"], "--steps: they are for"),
        (["compress", "{tiny}", "--layers", "1", "--texts", "{out}/nope.txt", "-o", "{out}/new"], "No such file"),
        (
            [
                "compress",
                "{tiny}",
                "--layers",
                "1",
                "--recipe",
                "{out}/none.toml",
                "--texts",
                "default",
                "-o",
                "{out}/new",
            ],
            "--recipe",
        ),
        (["compress", "{tiny}", "--recipe", "{out}/none.toml", "--texts", "default", "-o", "{out}/new"], "none.toml"),
        (["compress", "{quantized}", "--layers", "1", "--texts", "default", "-o", "{out}/new"], "quantized already"),
        (["compress", "{tiny}", "--quantize", "w9a9", "--texts", "default", "-o", "{out}/new"], "w9a9"),
        (["explain", "{out}/missing"], "missing"),
        (["inspect", "{out}"], "config.json"),
        (["inspect", "{tiny}"], "quantization_config"),
        (["eval", "{tiny}", "--task", "nonsense"], "nonsense"),
        (["eval", "{tiny}", "--data", "{out}/none.tsv"], "none.tsv"),
        (["analyze", "{tiny}", "--seq", "100000"], "100000"),
        (["analyze", "{tiny}", "--target", "abacus"], "abacus"),
        (["compare", "{tiny}", "--scheme", "w9a9"], "w9a9"),
        (["compare", "{tiny}", "--scheme", "w8a8:sometimes"], "sometimes"),
        (["advise", "{tiny}", "--target", "abacus"], "abacus"),
        (["advise", "{tiny}", "--batch", "0"], "batch 0"),
        (["advise", "{tiny}", "--task", "trec"], "allowed with --goal"),
        (["advise", "{tiny}", "--goal", "speed", "--task", "trec"], "goal 'speed'"),
        (["advise", "{tiny}", "--goal", "size", "--target", "h100"], "on this machine"),
        (["advise", "{tiny}", "--results", "{out}/none.json"], "none.json"),
        (["quantize", "{tiny}", "--emulate", "weights=mxfp5", "-o", "{out}"], "mxfp5"),
        (["quantize", "{tiny}", "--emulate", "bias=int8", "-o", "{out}"], "bias=int8"),
        (["quantize", "{tiny}", "--emulate", "weights=int8", "--embedding", "w8", "-o", "{out}"], "--embedding"),
        (["formats", "--show", "mxfp5"], "mxfp5"),
        (["formats", "--show", "{out}/none.py:mine"], "none.py"),
        (["study", "{tiny}"], "no format"),
        (["study", "{tiny}", "--format", "mxfp5"], "mxfp5"),
        (["study", "{tiny}", "--format", "int4", "--sites", "biases"], "biases"),
        (["study", "{tiny}", "--sweep", "element=int9"], "int9"),
        (["bench", "gemm", "--target", "abacus"], "abacus"),
        (["bench", "gemm", "--predict", "--target", "abacus"], "abacus"),
        (["bench", "attention", "--model", "huge"], "huge"),
        (["bench", "bert", "--cases", "many"], "many"),
        (["bench", "bert", "--peers", "everyone"], "everyone"),
        (["bench", "quantize", "--scheme", "w9a9"], "w9a9"),
        (["bench", "accuracy", "--task", "nonsense"], "nonsense"),
        (["bench", "accuracy", "--way", "w8a8:sometimes"], "sometimes"),
        (["bench", "report", "{out}/none.json"], "none.json"),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:3]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(arguments, named, tiny, quantized, tmp_path):
    names = {"tiny": tiny, "quantized": quantized[0], "out": tmp_path}
    done = run(*(each.format(**names) for each in arguments), check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    assert list(tmp_path.iterdir()) == [], "something half-written"


def test_the_program_itself(tmp_path):
    """Once as a shell runs it: exit code, one line, no traceback."""
    done = subprocess.run([sys.executable, "-m", "qbert", "inspect", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: checkpoint: config.json")
    assert done.stderr.count("\n") == 1


def test_a_missing_option_is_exit_code_2(tiny):
    done = run("quantize", tiny, check=False)
    assert done.returncode == 2
    assert "--output" in done.stderr


def test_a_folder_that_is_no_checkpoint_is_left_alone(tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    done = run("quantize", tiny, "-o", tmp_path, check=False)
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_compare_measures_what_went_through_a_file(tiny, tmp_path):
    """The whole job on made-up texts; figures of real models are printed by `make demo`."""
    pytest.importorskip("matplotlib")
    from qbert import compare
    from qbert.evaluate import labelled_dataset, task_data

    texts = [f"word{i % 7} number {i}" for i in range(60)]
    data = task_data(labelled_dataset("made-up", [(text, "odd" if i % 2 else "even") for i, text in enumerate(texts)]))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder())
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ways = [("w8a8", None), ("gobo3", "w8"), ("w8a8", None, "dynamic"), ("w8a8", "w8", "static")]
    result = compare.compare(str(tmp_path / "model"), [data], ways, batch=1, seq=8)
    assert [row.name for row in result.rows] == ["float32", "w8a8", "gobo3+w8", "w8a8:dynamic", "w8a8+w8:static"]
    assert result.rows[1].cosine_mean > result.rows[2].cosine_mean > 0.8
    assert result.rows[2].bits_per_weight < 8.6
    assert min(row.cosine_mean for row in result.rows[3:]) > 0.99
    compare.plot(result, tmp_path / "plots" / "bits.png")
    assert (tmp_path / "plots" / "bits.png").stat().st_size > 10_000


def test_compare_leaves_out_what_cannot_be_fused():
    from qbert.compare import DEFAULT_WAYS, _possible

    linear = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert [way.name for way in _possible(list(DEFAULT_WAYS), linear, asked_for=False) if way.fused] == []
    with pytest.raises(QBertError, match="no fused encoder: Sequential is of no family"):
        _possible(list(DEFAULT_WAYS), linear, asked_for=True)


def _tokenizer_folder():
    from qbert.zoo import resolve_model

    try:
        return resolve_model("minilm")
    except QBertError as error:
        pytest.skip(str(error))


def test_version_and_info_say_what_is_here():
    assert run("--version").stdout.strip() == f"qbert {qbert.__version__}"
    report = json.loads(run("info", "--json").stdout)
    assert report["versions"]["qbert"] == qbert.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["extensions"] == target.extensions()
    printed = run("info").stdout
    for extension, state in report["extensions"].items():
        assert f"{extension}: {state}" in printed
    assert f"transformers: {report['versions']['transformers']}" in printed
    assert "GPU: " in printed


@pytest.mark.parametrize(
    ("arguments", "table"), [((), "w8"), (("--embedding", "none"), "float32")], ids=("default", "none")
)
def test_quantize_takes_the_embeddings_to_8_bits_unless_told_not_to(tiny, tmp_path, arguments, table):
    run("quantize", tiny, *arguments, "-o", tmp_path / "out")
    report = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert {row["scheme"] for row in report["modules"] if "embeddings" in row["name"]} == {table}
    assert {row["scheme"] for row in report["modules"] if "encoder" in row["name"]} == {"w8a8"}
