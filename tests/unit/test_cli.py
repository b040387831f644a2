"""The command line as its users meet it: options, help, output, exit status."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
from safetensors.torch import load_file, save_file

from rayllm.cli import console
from rayllm.cli.config_file import merge, read_config, serve_config
from rayllm.cli.main import app, main
from rayllm.cli.options import EngineOptions
from rayllm.core.config import SchedulerConfig
from rayllm.core.errors import ConfigError
from rayllm.core.tokenizer import Tokenizer
from rayllm.models.quantization import stored_format, write_quantization

ENGINE = (
    "--tp --pp --dtype --quantize --max-model-len --kv-cache-memory --kv-cache-dtype --gpu-memory-fraction"
    " --max-num-seqs"
    " --max-num-batched-tokens"
)
SAMPLING = "--max-tokens --temperature --top-k --top-p --min-p --repetition-penalty --seed --stop"
GENERATE = (
    "--n --min-tokens --frequency-penalty --presence-penalty --logit-bias --stop-token-id --ignore-eos --logprobs"
    " --prompt-logprobs"
)
WORKLOAD = "--requests --input-len --output-len"

# An option is a promise to keep: adding one means adding it here, with a reason in the commit.
FROZEN = {
    "": "--version --verbose -v",
    "serve": (
        f"model {ENGINE} --config --model-name --http-port --grpc-port --replicas --min-replicas --max-replicas"
        " --shard-recovery-timeout --drain-timeout --json"
    ),
    "promote": "checkpoint --url --canary --gate --json",
    "rollback": "--url --json",
    "generate": f"model {ENGINE} {SAMPLING} {GENERATE} --prompt -p --chat --json",
    "chat": f"model {ENGINE} {SAMPLING} --url --system --json",
    "data": "",
    "data pack": "inputs --output -o --tokenizer --model --sequence-length -n --kind --drop-long --json",
    "data show": "directory --rows --first --tokenizer",
    "eval": "",
    "eval report": "runs --output -o --json",
    "eval run": (
        f"model {ENGINE} --tasks --url --num-fewshot --limit --data --output --seed --allow-code-execution --json"
    ),
    "doctor": "--tp --pp --gpus --address --json",
    "models": "",
    "models list": "--json",
    "models fetch": "name --json",
    "models show": "model --json",
    "bench": "",
    "bench kernels": "--output -o --quick --repeats",
    "bench offline": f"model {ENGINE} {WORKLOAD} --repeats --against-transformers --json",
    "bench serve": f"{ENGINE} {WORKLOAD} --url --in-process --concurrency --json",
    "quantize": "model out --scheme --outliers --calibration --skip --json",
    "train": "",
    "train pretrain": "--config --set --address --json",
    "train sft": "--config --set --address --json",
    "train rm": "--config --set --address --json",
    "train ppo": "--config --set --address --json",
    "train dpo": "--config --set --address --json",
    "train report": "run --output -o --json",
    "parity": "model --tp --pp --dtype --int8 --prompts --bound --json",
    "plan": (
        "model --params --dtype --quantize --kv-cache-dtype --gpu-memory --gpu-memory-fraction --context --max-gpus"
        " --json"
    ),
}


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def rayllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command line in this process."""

    def run(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["rayllm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_:
            main()
        output = capsys.readouterr()
        return Result(int(exit_.value.code or 0), output.out, output.err)

    return run


def commands() -> Iterator[tuple[str, Any]]:
    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield name, command
        for child, sub in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {child}".strip(), sub)

    yield from walk("", typer.main.get_command(app))


def option_names(command: Any) -> set[str]:
    with command.make_context(command.name, [], resilient_parsing=True) as context:
        names = {
            name for parameter in command.get_params(context) for name in parameter.opts + parameter.secondary_opts
        }
    return names - {"--help", "-h"}


def test_no_option_comes_or_goes_unnoticed():
    assert {name: option_names(command) for name, command in commands()} == {
        name: set(options.split()) for name, options in FROZEN.items()
    }


@pytest.mark.parametrize("name", FROZEN)
def test_help_explains_and_gives_an_example(rayllm, name):
    result = rayllm(*name.split(), "--help")
    assert result.status == 0
    assert result.err == ""
    example = "Start here" if name == "" else "Example"
    assert f"{example}: rayllm {name}".strip() in " ".join(result.out.split())
    command = dict(commands())[name]
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{name} {parameter.name} is not explained"


def test_nothing_heavy_is_imported_before_a_command_runs():
    heavy = ["torch", "transformers", "ray", "grpc", "fastapi", "pydantic", "httpx", "numpy", "numba"]
    code = f"import sys, rayllm.cli.main; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_plan_needs_no_torch(tiny_model: Path):
    code = (
        "import sys; from rayllm.cli.main import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "plan", str(tiny_model), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["layouts"][0]["tp"] == 1


def test_plan_json(rayllm):
    result = rayllm("plan", "--params", "175e9", "--dtype", "bfloat16", "--gpu-memory", "80GB", "--json")
    assert result.status == 0
    assert result.err == ""
    figures = json.loads(result.out)
    assert figures["weights_gb"] == 350.0
    assert figures["gpus"] == 5
    assert figures["training"] == {"bytes_per_param": 16, "state_gb": 2800.0, "gpus": 35}


def test_plan_of_int8(rayllm, tiny_model: Path, tmp_path: Path):
    result = rayllm("plan", tiny_model, "--quantize", "w8a8", "--kv-cache-dtype", "int8", "--json")
    shown = json.loads(result.out)
    assert (shown["int8"], shown["bytes_per_param"], shown["kv_dtype"]) == (True, 1, "int8")
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = write_quantization(stored_format("w8a8", outliers=False), ignore=[])
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = rayllm("plan", tmp_path)
    assert result.status == 1
    assert "is an int8 checkpoint; plan for the model that it was made of, with --quantize" in result.err


def test_plan_table_shows_the_arithmetic(rayllm, tiny_model: Path):
    result = rayllm("plan", tiny_model, "--dtype", "float32", "--gpu-memory", "1GB")
    assert result.status == 0
    assert "2 (K, V) x 3 layers x 3 KV heads x 8 x 4 bytes" in result.out
    assert "576 bytes" in result.out
    assert "Layouts that divide evenly" in result.out


def test_models(rayllm, tiny_model: Path):
    listed = json.loads(rayllm("models", "list", "--json").out)["models"]
    assert [model["name"] for model in listed] == ["smollm2-135m"]
    shown = json.loads(rayllm("models", "show", tiny_model, "--json").out)
    assert (shown["family"], shown["layers"], shown["kv_bytes_per_token"]["float32"]) == ("llama", 3, 576)
    assert "llama" in rayllm("models", "show", tiny_model).out
    assert shown["quantization"] is None
    fetched = json.loads(rayllm("models", "fetch", tiny_model, "--json").out)
    assert fetched == {"name": str(tiny_model), "directory": str(tiny_model)}


def test_models_show_tells_int8(rayllm, tiny_model: Path, tmp_path: Path):
    made = rayllm(
        "quantize", tiny_model, tmp_path / "out", "--scheme", "w8a8", "--outliers", "mixed", "--skip", "lm_head"
    )
    assert made.status == 0
    shown = json.loads(rayllm("models", "show", tmp_path / "out", "--json").out)
    assert (shown["quantization"], shown["not_quantized"]) == ("int8 w8a8, outlier columns in 16 bits", "lm_head")
    assert "int8 w8a8" in rayllm("models", "show", tmp_path / "out").out


def test_generate_json_of_one_answer(rayllm, tiny_model: Path):
    arguments = ["generate", tiny_model, "--temperature", "0", "--max-tokens", "4", "--ignore-eos", "--json"]
    result = rayllm(*arguments, stdin="the end\n")
    assert result.status == 0
    answer = json.loads(result.out)  # one object and nothing else
    assert answer["prompt"] == "the end"
    assert len(answer["token_ids"]) == 4
    assert answer["finish_reason"] == "length"
    assert isinstance(answer["text"], str)
    assert answer["outputs"] == [{name: answer[name] for name in answer["outputs"][0]}]
    assert json.loads(rayllm(*arguments, "--prompt", "the end").out) == answer


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_generate_says_that_a_model_gives_no_probabilities(rayllm, make_tiny_model: Callable[..., Path], form):
    """Finite weights, whose products are not."""
    model = make_tiny_model()
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = rayllm("generate", model, "--prompt", "the end", "--max-tokens", 3, *form)
    assert (result.status, result.err.splitlines()[-1]) == (
        1,
        "error: the model gave no finite probabilities for the next token",
    )
    if form:
        assert json.loads(result.out)["finish_reason"] == "error"


def test_generate_json_of_many_answers(rayllm, tiny_model: Path):
    result = rayllm(
        *("generate", tiny_model, "-p", "a", "-p", "the", "--n", 2, "--seed", 3, "--max-tokens", 3, "--ignore-eos"),
        *("--logprobs", 1, "--prompt-logprobs", 0, "--logit-bias", "65=100", "--json"),
    )
    answers = json.loads(result.out)
    assert "text" not in answers
    assert [(answer["prompt"], answer["index"]) for answer in answers["outputs"]] == [
        ("a", 0),
        ("a", 1),
        ("the", 0),
        ("the", 1),
    ]
    for answer in answers["outputs"]:
        assert answer["token_ids"] == [65, 65, 65]
        assert all(len(entry["top"]) == 1 for entry in answer["logprobs"])
        assert answer["prompt_logprobs"][0] is None


def test_generate_prints_text_and_applies_the_chat_template(rayllm, tiny_model: Path):
    arguments = ["generate", tiny_model, "--chat", "-p", "the", "--max-tokens", 2, "--temperature", 0, "--json"]
    ids = json.loads(rayllm(*arguments).out)["prompt_token_ids"]
    plain = json.loads(rayllm("generate", tiny_model, "-p", "the", "--max-tokens", 1, "--json").out)
    assert len(ids) > len(plain["prompt_token_ids"])
    letter = Tokenizer.load(tiny_model).decode([65])
    result = rayllm("generate", tiny_model, "-p", "a", "-p", "the", "--max-tokens", 2, "--logit-bias", "65=100")
    assert result.out == 2 * f"{2 * letter}\n"
    assert result.err == "--- 'a' #0\n--- 'the' #0\n"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["generate", "{model}", "-p", "hi", "--top-p", "3"], "top_p: 3.0 is not in (0, 1]"),
        (["generate", "{model}", "-p", "hi", "--logit-bias", "x"], "logit_bias: 'x' is not ID=BIAS, such as 42=-5"),
        (["generate", "{model}", "-p", "hi", "--dtype", "int4"], "dtype: 'int4' is not one of"),
        (["generate", "{model}", "-p", "hi", "--tp", "5"], "tensor parallel size 5 does not divide"),
        (["generate", "/no/such/model", "-p", "hi"], "/no/such/model: no such file or directory"),
        (["models", "show", "/no/such/model"], "/no/such/model: is not a directory here"),
        (["chat", "--url", "ftp://localhost"], "--url: 'ftp://localhost' begins with none of"),
        (["chat", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1: "),
        (["promote", "x", "--url", "127.0.0.1:1"], "--url: '127.0.0.1:1' is no http:// or https:// address"),
        (["rollback", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1: no endpoint that you started listens there"),
        (["promote", "x", "--gate", "/no/such/file"], "--gate: /no/such/file cannot be read as text"),
        (["bench", "serve", "--url", "grpc://127.0.0.1:1", "--requests", "1"], "every request failed: "),
        (["serve", "--config", "/no/such/file"], "/no/such/file: No such file or directory"),
        (["serve"], "no model: name one"),
        (["eval", "{model}", "--tasks", "hellaswagg"], "no task is called 'hellaswagg'; did you mean hellaswag?"),
        (["eval", "{model}", "--tasks", ","], "--tasks: names no task"),
        (["eval", "--tasks", "piqa"], "give either a model or --url"),
        (["eval", "{model}", "--url", "http://127.0.0.1:1", "--tasks", "piqa"], "give either a model or --url"),
        (["eval", "--url", "http://127.0.0.1:1", "--tasks", "piqa"], "http://127.0.0.1:1: "),
        (["eval", "--url", "grpc://127.0.0.1:1", "--tasks", "piqa"], "grpc://127.0.0.1:1: "),
        (["eval", "--url", "127.0.0.1:1", "--tasks", "piqa"], "--url: '127.0.0.1:1' begins with none of http://"),
        (["eval", "{model}", "--tasks", "piqa", "--data", "/nowhere"], "/nowhere: no such folder. Get it"),
    ],
)
def test_an_error_is_one_line_on_stderr(rayllm, tiny_model: Path, arguments, problem):
    result = rayllm(*(str(tiny_model) if argument == "{model}" else argument for argument in arguments))
    assert result.status == 1
    assert result.out == ""
    assert result.err.startswith(f"error: {problem}")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "x", "--bogus"],
        ["plan"],
        ["plan", "dir", "--params", "7B"],
        ["plan", "--params", "many"],
        ["plan", "--params", "7B", "--gpu-memory", "80 GiraffeBytes"],
        ["chat"],
        ["promote"],
        ["promote", "x", "--canary", "0.1"],
        ["promote", "x", "--canary", "110%"],
        ["bench", "serve"],
        ["eval", "x"],
        ["eval", "x", "--tasks", "piqa", "--limit", "0"],
        ["nonsense"],
    ],
)
def test_wrong_usage_is_status_2(rayllm, arguments):
    result = rayllm(*arguments)
    assert result.status == 2
    assert result.out == ""
    assert "Traceback" not in result.err


def test_a_cluster_that_is_no_address_is_named(rayllm):
    result = rayllm("doctor", "--address", "nonsense")
    assert (result.status, result.out) == (1, "")
    assert result.err == "error: cannot join the Ray cluster at nonsense: Invalid address format: nonsense\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "--url", "http://127.0.0.1:1", "--kv-cache-dtype", "int8"],
        ["bench", "serve", "--url", "http://127.0.0.1:1", "--kv-cache-dtype", "int8"],
        ["eval", "--url", "http://127.0.0.1:1", "--tasks", "piqa", "--kv-cache-dtype", "int8"],
    ],
)
def test_an_engines_option_beside_a_url_is_refused(rayllm, arguments):
    result = rayllm(*arguments)
    assert result.status == 2
    assert "--kv-cache-dtype is for a model that is loaded here" in " ".join(result.err.replace("│", " ").split())


def test_eval_json_and_resume(rayllm, tiny_model: Path, tmp_path: Path):
    goals = [{"goal": "To dry", "sol1": "use paper", "sol2": "use soup", "label": i % 2} for i in range(6)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in goals))
    arguments = ["eval", tiny_model, "--tasks", "piqa", "--data", tmp_path, "--output", tmp_path / "run"]
    first = json.loads(rayllm(*arguments, "--limit", 4, "--json").out)
    assert first["tasks"]["piqa"]["num_documents"] == 4
    assert first["weight_version"].startswith("w-")
    whole = json.loads(rayllm(*arguments, "--json").out)
    assert (whole["tasks"]["piqa"]["num_documents"], whole["tasks"]["piqa"]["num_resumed"]) == (6, 4)
    assert whole["tasks"]["piqa"]["metrics"]["acc"]["value"] == 0.5
    assert json.loads((tmp_path / "run/results.json").read_text())["tasks"] == whole["tasks"]
    table = rayllm(*arguments).out
    assert "acc_norm" in table
    other = rayllm(*arguments, "--seed", 7)
    assert other.status == 1
    assert "holds another run (seed: 0 there, 7 here)" in other.err
    other = rayllm(*arguments, "--quantize", "w8a8")
    assert other.status == 1
    assert "holds another run (quantize: None there, 'w8a8' here)" in other.err


def test_eval_goes_on_where_it_was_killed(rayllm, tiny_model: Path, tmp_path: Path):
    """SIGKILL, as the kernel's out-of-memory killer sends it: nothing is tidied up."""
    goals = [{"goal": f"To dry {i}", "sol1": "use paper", "sol2": "use soup", "label": i % 3 % 2} for i in range(3000)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in goals))
    arguments = ["eval", tiny_model, "--tasks", "piqa", "--data", tmp_path, "--json", "--output"]
    killed = subprocess.Popen(
        [sys.executable, "-m", "rayllm", *map(str, arguments), str(tmp_path / "run")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first_shard = tmp_path / "run/samples/piqa/00000.parquet"
    while not first_shard.exists():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    resumed = json.loads(rayllm(*arguments, tmp_path / "run").out)["tasks"]["piqa"]
    assert 0 < resumed["num_resumed"] < resumed["num_documents"] == 3000
    unbroken = json.loads(rayllm(*arguments, tmp_path / "unbroken").out)["tasks"]["piqa"]
    assert resumed["metrics"] == unbroken["metrics"]


def test_version(rayllm):
    assert rayllm("--version").out.startswith("rayllm ")


def test_interrupt_is_status_130(tiny_model: Path):
    """Ctrl-C while a command waits for its input."""
    waits = (
        "import os, signal; from rayllm.cli.main import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "signal.setitimer(signal.ITIMER_REAL, 1.0)\n"
        "main()"
    )
    command = [sys.executable, "-c", waits, "generate", str(tiny_model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(60) == 130
            assert process.stdout is not None
            assert process.stderr is not None
            assert process.stdout.read() == b""
            assert b"Traceback" not in process.stderr.read()
        finally:
            process.kill()


def write_config(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_configuration_file(tmp_path: Path):
    file = write_config(
        tmp_path / "server.toml",
        """
        [model]
        model = "from-the-file"
        dtype = "float32"
        [parallel]
        tensor = 3
        [scheduler]
        max_num_seqs = 7
        [cache]
        gpu_memory_fraction = 1
        [serve]
        http_port = 8080
        drain_timeout_s = 2
        """,
    )
    served = serve_config(merge(read_config(file), EngineOptions().sections(None)))
    assert (served.http_port, served.grpc_port, served.drain_timeout_s) == (8080, 9000, 2.0)
    config = served.engine
    assert (config.model.model, config.model.dtype, config.parallel.tensor) == ("from-the-file", "float32", 3)
    assert config.scheduler.max_num_seqs == 7
    assert config.scheduler.max_num_batched_tokens == SchedulerConfig().max_num_batched_tokens
    assert config.cache.gpu_memory_fraction == 1.0
    options = EngineOptions(tp=1, dtype="bfloat16", kv_cache_memory=1 << 20)
    wins = serve_config(merge(read_config(file), options.sections("given"))).engine
    assert (wins.model.model, wins.model.dtype, wins.parallel.tensor) == ("given", "bfloat16", 1)
    assert wins.cache.cpu_memory_bytes == 1 << 20


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[models]\n", r"models: there is no such setting; the nearest is model$"),
        ("[model]\nmax_len = 3\n", r"model\.max_len: .* the nearest is model\.max_model_len$"),
        ("[scheduler]\nmax_num_seqs = 'many'\n", r"^scheduler\.max_num_seqs: expected `int`, got `str`$"),
        ("[scheduler]\nmax_num_seqs = 1000000000\n", r"max_num_seqs: 1000000000 is more than 65536"),
        ("[scheduler]\nmax_num_batched_tokens = 9000000\n", r"max_num_batched_tokens: 9000000 is more than 1048576"),
        ("[model]\nmax_model_len = 1000000000\n", r"max_model_len: 1000000000 is more than 16777216"),
        ("[model]\nquantize = 'w4'\n", r"^model\.quantize: invalid enum value 'w4'; it is one of w8a8, w8a16$"),
        ("[parallel]\ntensor = true\n", r"^parallel\.tensor: expected `int`, got `bool`$"),
        ("[parallel]\ntensor = 0\n", "tensor parallel size: 0 is less than 1"),
        ("[serve]\nhttp_port = 'x'\n", r"^serve\.http_port: expected `int`"),
        ("[serve]\nengine = 3\n", r"serve\.engine: there is no such setting"),
        ("model = 'x'\n", "model: must be a table"),
        ("[model\n", "not a TOML file"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path: Path, text, problem):
    with pytest.raises(ConfigError, match=problem):
        serve_config(merge(read_config(write_config(tmp_path / "bad.toml", text)), EngineOptions().sections("x")))


def test_what_libraries_print_does_not_reach_stdout(capsys):
    with console.stdout_kept_clean():
        print("loading")
    console.print_json({"text": "안녕"})
    output = capsys.readouterr()
    assert output.out == '{"text": "안녕"}\n'
    assert output.err == "loading\n"
