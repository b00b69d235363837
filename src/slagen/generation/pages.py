"""write_page(reports) -> the path of their page, written whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slagen.errors import UsageError, WeightsError
from slagen.generation.report_page import EMBEDDED, GENERATOR, Shown, report_page
from slagen.generation.video_report import FORM, VideoReport
from slagen.io.documents import read_json
from slagen.io.files import reserved, write_text
from slagen.io.paths import is_video, user_path
from slagen.io.reading import open_regular

ADVICE = "Give a report with measured times, as slagen generate writes it."
MAX_REPORTS = 16  # of a page


def write_page(paths: Sequence[str], output: Path | None, overwrite: bool) -> Path:
    """Write the page of reports, with their videos where these are beside them.

    Args:
        paths: reports, or the videos beside them. output: the page; None puts it beside the first report.
    Raises: UsageError for what does not exist, or a page that does, WeightsError for what is no report with times.
    """
    if len(paths) > MAX_REPORTS:
        raise UsageError(f"{len(paths)} reports are given, but a page holds at most {MAX_REPORTS}. Give fewer.")
    shown = [_read(user_path(path)) for path in paths]
    page = output or user_path(paths[0]).with_suffix(".html")
    with reserved(page):
        if page.exists() and not overwrite:
            raise UsageError(f"{page} exists. Choose another --output, or replace it with --overwrite.")
        write_text(page, report_page(shown))
    return page


def is_report_page(path: Path) -> bool:
    """Whether a file is a page that `slagen report` wrote, and not somebody's own."""
    try:
        with open_regular(path) as handle:
            return f'content="{GENERATOR}"'.encode() in handle.read(2048)
    except OSError:
        return False


def read_report(path: Path) -> VideoReport:
    """A report with its times. Raises UsageError where there is none, WeightsError for what is none."""
    if not path.exists():
        raise UsageError(f"{path} does not exist. {ADVICE}")
    content = read_json(path, advice=ADVICE)
    if content.get("kind") in ("comparison", "attention map"):
        raise WeightsError(f"{path} is the JSON output of another command, not the report of a video. {ADVICE}")
    if "restored" in content:
        raise WeightsError(f"{path} was restored from the metadata of a video and has no times. {ADVICE}")
    return VideoReport.from_dict(read_json(path, FORM, advice=ADVICE))


def _read(path: Path) -> Shown:
    report = path.with_suffix(".json") if is_video(str(path)) else path
    record = read_report(report)
    video = report.parent / (record.video.file or "")
    beside = video.is_file() and Path(record.video.file or "").name == record.video.file
    if not beside:
        return Shown(report.name, record, None)
    # What is too large for the page is not read: a byte more than fits is enough to say so.
    with video.open("rb") as handle:
        return Shown(report.name, record, handle.read(EMBEDDED + 1))
