"""Downloads, against a stand-in for the hub on 127.0.0.1 that is reached through HF_ENDPOINT, as a mirror is."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
from conftest import needs
from huggingface_hub import constants
from wan_models import save_pipeline

from slagen.cli.main import run
from slagen.errors import SlagenError
from slagen.wan import hub as hub_files

REPO, SHA = "Wan-AI/Wan2.1-small", "a" * 40
FILES = {
    "model_index.json": b'{"_class_name": "WanPipeline"}',
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": os.urandom(300_000),
    "vae/diffusion_pytorch_model.safetensors": os.urandom(5_000),
    "README.md": b"not wanted",
}
FETCH = """
import sys
from slagen.wan import hub
print(hub.fetch_pipeline(sys.argv[1], transformer=True, local_files_only="local" in sys.argv, on_note=print))
"""


class StandIn(BaseHTTPRequestHandler):
    """The few answers of the hub that a download asks for. Its class attributes say how it misbehaves."""

    files: dict[str, bytes] = FILES
    token: str | None = None
    sizes: dict[str, int] = {}
    cut: set[str] = set()  # files whose answers break off half way
    mend = False  # but the first time only
    served: list[tuple[str, str]] = []
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = urlparse(self.path).path
        if self.token is not None and self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.reply(
                401, b'{"error": "Invalid credentials"}', {"X-Error-Message": "Invalid credentials"}, body
            )
        if path.startswith(f"/api/models/{REPO}"):
            entries = [
                {"rfilename": name, "path": name, "type": "file", "oid": hashlib.sha1(data).hexdigest(),
                 "size": self.sizes.get(name, len(data))}
                for name, data in self.files.items()
            ]  # fmt: skip
            content = entries if "/tree/" in path else {"id": REPO, "sha": SHA, "siblings": entries}
            return self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, body)
        name = path.removeprefix(f"/{REPO}/resolve/{SHA}/")
        if name not in self.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound" if REPO in path else "RepoNotFound"}, body)
        data = self.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if body:
            self.served.append((name, f"from {start}"))
        part = data[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = body and name in self.cut
        if cut and self.mend:
            self.cut.discard(name)
        self.reply(206 if start else 200, part, headers, body, cut=cut)

    def reply(self, code, content, headers, body, cut=False):
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True


@pytest.fixture
def hub():
    handler = type(
        "Handler", (StandIn,), {"served": [], "cut": set(), "sizes": {}, "token": None, "files": dict(FILES)}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield handler
    server.shutdown()


def fetch_in_a_process(url, home, *arguments, **environment):
    """What is said of a pipeline, and its folder; with the settings of the environment, which are read on import."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(Path(__file__).parents[2] / "src"), **environment}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *arguments], env=env, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def hub_at(url, home, offline=False, token=None):
    """In this process, what these settings of the environment would have set."""
    with pytest.MonkeyPatch.context() as patch:
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        found = {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": offline,
        }
        for name, value in found.items():
            patch.setattr(constants, name, value)
        patch.setattr(time, "sleep", lambda seconds: None)  # between two tries
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        yield


def fetch(url, home, name, repo, local=False, **settings):
    """The exit code, and what is said: notes, then the folder, or the error."""
    said = []
    options = {"local_files_only": local, "on_note": said.append}
    with hub_at(url, home, **settings):
        try:
            if name == "sla":
                said.append(hub_files.fetch_sla(repo, **options))
            elif name == "weights":
                said.append(hub_files.fetch_weights(repo, **options))
            else:
                said.append(hub_files.fetch_pipeline(repo, transformer=name == "pipeline", **options))
        except SlagenError as error:
            return error.exit_code, "\n".join([*said, str(error)])
    return 0, "\n".join(map(str, said))


def test_what_is_wanted_is_fetched_once(hub, tmp_path):
    code, out = fetch(hub.url, tmp_path, "pipeline", REPO)
    note, folder = out.splitlines()
    assert code == 0 and "downloading 4 files" in note
    found = {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    assert found == {name: data for name, data in FILES.items() if name != "README.md"}
    hub.served.clear()
    assert fetch(hub.url, tmp_path, "pipeline", REPO) == (0, folder) and not hub.served
    # and with nobody to ask
    assert fetch("http://127.0.0.1:9", tmp_path, "pipeline", REPO) == (0, folder)
    assert fetch(hub.url, tmp_path, "pipeline", REPO, offline=True) == (0, folder)
    assert fetch(hub.url, tmp_path, "pipeline", REPO, local=True) == (0, folder)


@pytest.mark.slow
def test_the_environment_is_what_huggingface_hub_reads(hub, tmp_path):
    """HF_ENDPOINT and HF_HOME; then nobody is asked."""
    note, folder = fetch_in_a_process(hub.url, tmp_path, REPO).splitlines()
    assert "downloading 4 files" in note and folder.startswith(str(tmp_path / "hub"))
    hub.served.clear()
    assert fetch_in_a_process(hub.url, tmp_path, REPO, HF_HUB_OFFLINE="1") == folder and not hub.served


def test_a_replaced_transformer_is_not_fetched(hub, tmp_path):
    code, out = fetch(hub.url, tmp_path, "base", REPO)
    folder = Path(out.splitlines()[-1])
    assert code == 0 and (folder / "transformer" / "config.json").is_file()
    assert not list((folder / "transformer").glob("*.safetensors"))


def test_sla_weights_are_fetched_alone(hub, tmp_path):
    code, out = fetch(hub.url, tmp_path, "sla", REPO)
    assert code == 5 and f"{REPO} does not contain sla.safetensors" in out
    hub.files["sla.safetensors"] = b"weights"
    code, out = fetch(hub.url, tmp_path / "again", "sla", REPO)
    path = Path(out.splitlines()[-1])
    assert code == 0 and path.read_bytes() == b"weights" and [p.name for p in path.parent.iterdir()] == [path.name]
    code, out = fetch("http://127.0.0.1:9", tmp_path / "empty", "sla", REPO)
    assert code == 4 and f"{REPO} is not on this machine" in out and out.endswith("or give a file or folder.")


@pytest.mark.slow
def test_encoding_videos_fetches_no_transformer(hub, tmp_path, capsys):
    needs("av", "slagen[finetune]")
    from test_videos import write_video

    model = save_pipeline(tmp_path / "model")
    hub.files = {str(file.relative_to(model)): file.read_bytes() for file in model.rglob("*") if file.is_file()}
    (raw := tmp_path / "raw").mkdir()
    for number in range(2):
        write_video(raw / f"{number}.mp4", [60 * number, 40], [0, 2000], (64, 64))
        (raw / f"{number}.txt").write_text("a red circle")
    command = ["finetune", "data", str(raw), "--output", str(tmp_path / "data"), "--model", REPO, "--size", "64x64",
               "--num-frames", "9", "--device", "cpu", "--json"]  # fmt: skip
    with hub_at(hub.url, tmp_path / "home"):
        assert run(command) == 0
    said = capsys.readouterr()
    assert "downloading" in said.err and json.loads(said.out)["training"] == 1
    fetched = {name for name, _ in hub.served}
    assert any(name.startswith("vae/") for name in fetched) and "transformer/config.json" in fetched
    assert not [name for name in fetched if name.startswith("transformer/") and name.endswith(".safetensors")]


def test_a_connection_that_breaks_once_is_taken_up_again(hub, tmp_path):
    name = "transformer/diffusion_pytorch_model.safetensors"
    hub.cut, hub.mend = {name}, True
    code, out = fetch(hub.url, tmp_path, "pipeline", REPO)
    assert code == 0 and (Path(out.splitlines()[-1]) / name).read_bytes() == FILES[name]
    assert len([file for file, _ in hub.served if file == name]) == 2


def test_what_an_interrupted_download_finished_is_kept(hub, tmp_path):
    name = "transformer/diffusion_pytorch_model.safetensors"
    hub.cut.add(name)
    code, out = fetch(hub.url, tmp_path, "pipeline", REPO)
    assert code == 4 and "finished files are kept" in out
    hub.cut.clear()
    hub.served.clear()
    code, out = fetch(hub.url, tmp_path, "pipeline", REPO)
    assert code == 0 and (Path(out.splitlines()[-1]) / name).read_bytes() == FILES[name]
    assert "vae/diffusion_pytorch_model.safetensors" not in {file for file, _ in hub.served}


def test_the_transformer_that_is_not_quantised(hub, tmp_path):
    hub.files = {"TurboWan-small.pth": b"weights", "TurboWan-small-quant.pth": b"int8", "README.md": b""}
    code, out = fetch(hub.url, tmp_path, "weights", REPO)
    assert code == 0 and Path(out.splitlines()[-1]).name == "TurboWan-small.pth"
    hub.files = {"one.pth": b"1", "two.pth": b"2"}
    code, out = fetch(hub.url, tmp_path / "other", "weights", REPO)
    assert code == 4 and "one.pth, two.pth" in out


@pytest.mark.parametrize("case", ["unreachable", "wrong-token", "too-large", "absent", "offline"])
def test_each_failure_is_one_message(case, hub, tmp_path):
    url, arguments, settings = hub.url, ["pipeline", REPO], {}
    if case == "unreachable":
        url, words = "http://127.0.0.1:9", "cannot be reached"
    elif case == "wrong-token":
        hub.token, settings, words = "right", {"token": "hf_wrong"}, "Check HF_TOKEN"
    elif case == "too-large":
        hub.sizes["vae/diffusion_pytorch_model.safetensors"] = 10**17
        words = "GiB free"
    elif case == "absent":
        arguments[1], words = "Wan-AI/nothing", "Wan-AI/nothing"
    else:
        settings, words = {"offline": True}, "is not on this machine"
    code, out = fetch(url, tmp_path, *arguments, **settings)
    assert code == 4 and words in out and len(out.splitlines()) == 1
    assert "hf_wrong" not in out
    assert not [p for p in tmp_path.rglob("*.safetensors")]
