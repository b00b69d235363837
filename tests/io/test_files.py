"""Files are whole or not there, links that were planted are not followed, and one run has a name at a time."""

import errno
import os
import signal
import stat

import pytest

from slagen.errors import SlagenError
from slagen.io import files, locks, stages


def in_child(work):
    """Do something in a child process that is then killed, as it is."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture(params=[0o022, 0o002, 0o077], ids="{:03o}".format)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_decides_who_may_read(tmp_path, umask):
    """safetensors writes with 0600 whatever the umask, and what goes out for a group was closed to it."""
    from safetensors.numpy import save_file

    with files.writing(tmp_path / "folder") as part:
        (part / "inner").mkdir(parents=True)
        save_file({}, part / "inner" / "x.safetensors")
        (part / "inner").chmod(0o700)
    files.write_bytes(tmp_path / "file", b"x")
    files.append(tmp_path / "log", b"x\n")
    for path in (tmp_path / "folder" / "inner" / "x.safetensors", tmp_path / "file", tmp_path / "log"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "folder" / "inner").stat().st_mode) == 0o777 & ~umask
    assert left(tmp_path) == []


def test_a_file_of_another_name_keeps_its_permissions(tmp_path):
    """convert links what it takes over of another model, whose files are not its own."""
    (tmp_path / "theirs").write_text("x")
    (tmp_path / "theirs").chmod(0o600)
    with files.writing(tmp_path / "folder") as part:
        part.mkdir()
        os.link(tmp_path / "theirs", part / "x")
    assert stat.S_IMODE((tmp_path / "theirs").stat().st_mode) == 0o600


def test_what_fails_leaves_things_as_they_were(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), files.writing(tmp_path / "a") as part:
        part.write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("number", range(12))
def test_a_set_that_cannot_be_moved_in_is_taken_back(tmp_path, monkeypatch, number):
    """Whichever renaming fails: all files are the old ones, or all are new."""
    for name in ("v.json", "v.mp4"):
        (tmp_path / name).write_text("old")
    count = 0

    def failing(function):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == number + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, failing(getattr(os, name)))
        try:
            with stages.staging(tmp_path) as stage:
                for name in ("v.json", "v.mp4"):
                    (stage.folder / name).write_text("new")
                stage.publish()
            done = True
        except OSError:
            done = False
    files.sweep(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("v.json", "v.mp4"), "new" if done else "old"
    )
    assert done == (number >= 5)


@pytest.mark.parametrize("before", [True, False], ids=["replaced", "fresh"])
@pytest.mark.parametrize("number", range(1, 8))
def test_a_killed_publishing_is_finished_or_undone_by_the_next_run(tmp_path, before, number):
    """Files and a folder of one set, killed before each renaming."""
    names = ("model", "v.json", "v.mp4")
    if before:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "only-old").write_text("old")
        for name in names[1:]:
            (tmp_path / name).write_text("old")

    def work():
        count = 0

        def counted(function):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        for name in ("rename", "replace"):
            setattr(os, name, counted(getattr(os, name)))
        with stages.staging(tmp_path) as stage:
            (stage.folder / "model").mkdir()
            for name in ("model/only-new", "v.json", "v.mp4"):
                (stage.folder / name).write_text("new")
            stage.publish()

    in_child(work)
    files.sweep(tmp_path)
    found = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    old = dict.fromkeys(("only-old", *names[1:]), "old") if before else {}
    assert found in (old, dict.fromkeys(("only-new", *names[1:]), "new"))
    assert left(tmp_path) == []


def test_what_belongs_to_what_is_replaced_goes_with_it(tmp_path):
    """A new video whose report could not be written stood beside the old one's."""
    for name in ("v.json", "v.mp4", "w.json"):
        (tmp_path / name).write_text("old")
    with stages.staging(tmp_path) as stage:
        (stage.folder / "v.mp4").write_text("new")
        stage.publish(without=("v.json", "v.txt"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"v.mp4": "new", "w.json": "old"}


def test_what_is_there_is_not_replaced_unless_asked(tmp_path):
    """It was looked for first and written later: what came between was lost."""
    (tmp_path / "v.mp4").write_text("theirs")
    with pytest.raises(FileExistsError), stages.staging(tmp_path) as stage:
        for name in ("v.json", "v.mp4"):
            (stage.folder / name).write_text("ours")
        stage.publish(replace=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"v.mp4": "theirs"}
    (tmp_path / "folder").mkdir()
    with files.writing(tmp_path / "folder", replace=False) as part:  # an empty one is no loss
        part.mkdir()
        (part / "x").write_text("ours")
    with pytest.raises(FileExistsError), files.writing(tmp_path / "folder", replace=False) as part:
        part.mkdir()
    with pytest.raises(IsADirectoryError), stages.staging(tmp_path) as stage:
        for name in ("folder", "v.mp4"):
            (stage.folder / name).write_text("ours")
        stage.publish()
    assert (tmp_path / "folder" / "x").read_text() == "ours"


def test_disks_without_hard_links_or_locks(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr("fcntl.flock", fail)
    monkeypatch.setattr(locks, "SWEEP_S", 0.01)
    with files.reserved(tmp_path / "a"):
        files.write_text(tmp_path / "a", "x", replace=False)
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "a", "y", replace=False)
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("name", ["v.json", "index.html", "manifest.jsonl"])
def test_planted_links_are_not_followed(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for link in (name, f"{name}.part"):
        (tmp_path / link).symlink_to(victim)
    with pytest.raises(OSError, match="link"):
        files.append(tmp_path / name, b"x\n")
    files.write_text(tmp_path / name, "new")
    assert victim.read_text() == "mine" and (tmp_path / name).read_text() == "new"
    assert not (tmp_path / name).is_symlink() and (tmp_path / f"{name}.part").is_symlink()


@pytest.mark.parametrize("name", ["new", "ready", "old"])
def test_a_planted_stage_moves_nothing(tmp_path, name):
    """A link inside what looks like a dead run's stage made the sweep move another folder's files."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    with stages.staging(tmp_path) as stage:
        planted = out / stage.root.name
    planted.mkdir(parents=True)
    (planted / name).symlink_to(victim)
    files.sweep(out)
    assert (victim / "thesis.txt").read_text() == "mine" and sorted(os.listdir(out)) == [planted.name]


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(SlagenError, match="file is not writable .*. Choose another output"),
        files.reserved(tmp_path / "file/v.mp4"),
    ):
        pass


def test_a_torn_line_is_closed(tmp_path):
    (tmp_path / "log").write_bytes(b"one\ntw")
    files.append(tmp_path / "log", b"three\n")
    files.append(tmp_path / "log", b"four\n")
    assert (tmp_path / "log").read_bytes() == b"one\ntw\nthree\nfour\n"


def test_only_what_the_dead_left_is_swept(tmp_path):
    """A lock says who lives, neither age nor the number of a process."""

    def work():
        with files.reserved(tmp_path / "v.mp4"), files.writing(tmp_path / "v.mp4") as part:
            part.write_text("half")
            (part.parent / ".tmpAbC123").write_text("as safetensors leaves")
            os.kill(os.getpid(), signal.SIGKILL)

    in_child(work)
    assert len(left(tmp_path)) == 2
    foreign = tmp_path / "theirs.part"
    foreign.write_text("x")
    with files.writing(tmp_path / "living") as part, files.reserved(tmp_path / "w.mp4"):
        part.write_text("x")
        assert len(left(tmp_path)) == 2
        files.sweep(tmp_path)
        assert part.is_file() and (tmp_path / ".w.mp4.slagen-lock").is_file()
    assert sorted(os.listdir(tmp_path)) == ["living", "theirs.part"]


def test_one_run_has_a_name_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SWEEP_S", 0.01)
    long = tmp_path / ("x" * 250)
    for path in (tmp_path / "v.mp4", long):
        with files.reserved(path):
            with pytest.raises(SlagenError, match="another slagen run is writing .*x+|v.mp4"), files.reserved(path):
                pass
            with files.reserved(tmp_path / "other.mp4"):
                pass
        with files.reserved(path):
            pass
    assert os.listdir(tmp_path) == []


def test_deleting_is_whole_too(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    files.delete(tmp_path / "link")
    assert (tmp_path / "folder").is_dir()
    files.delete(tmp_path / "folder")
    files.delete(tmp_path / "nothing")
    assert os.listdir(tmp_path) == []


def test_scratch_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def work():
        with files.scratch() as folder:
            (folder / "x").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    in_child(work)
    assert len(os.listdir(tmp_path)) == 1
    with files.scratch() as folder:
        assert os.listdir(tmp_path) == [folder.parent.name]
    assert os.listdir(tmp_path) == []
