"""The command `doctor`."""

from typing import Annotated

import typer

from slagen.errors import UsageError


def doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Compile every kernel for every supported GPU, and list their shared memory, registers, spills, "
            "instructions and asynchronous copies, and the estimated time of one call.",
        ),
    ] = False,
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest",
            help="Test the kernels, generate a video with the bundled model and run a short benchmark, in under five "
            "minutes on a GPU, and write the results to a JSON file to attach to an issue. Exits with code 6 if a "
            "check fails, and with code 4 if this machine lacks what a check needs.",
        ),
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            help="The file that --selftest writes. [default: slagen-selftest-<date>.json]", show_default=False
        ),
    ] = None,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Exit with code 4 if there is no usable GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Check what this machine can run, and show how to fix what it cannot.

    Example: slagen doctor --selftest
    """
    if kernels and selftest:
        raise UsageError("--kernels and --selftest cannot be combined. Give one of them.")
    if output is not None and not selftest:
        raise UsageError("--output names the file that --selftest writes. Add --selftest, or leave --output out.")
    from slagen.cli import progress

    progress.say_loading()
    if selftest:
        _test_itself(output, as_json)
    elif kernels:
        _list_kernels(as_json)
    else:
        _examine(require_gpu, as_json)


def _test_itself(output: str | None, as_json: bool) -> None:
    from slagen.cli import console
    from slagen.cli.output.doctor import show_selftest
    from slagen.doctor import selftest

    path = selftest.claim(output)
    result = selftest.selftest(console.note)
    selftest.write(result, path)
    show_selftest(result, path, as_json)
    selftest.check(result)


def _list_kernels(as_json: bool) -> None:
    from slagen.cli import console
    from slagen.cli.output.kernels import show_kernels
    from slagen.doctor import kernel_costs

    costs = kernel_costs.kernel_costs(console.note)
    show_kernels(costs, as_json)
    kernel_costs.check_kernels(costs)


def _examine(require_gpu: bool, as_json: bool) -> None:
    from slagen.cli.output.doctor import show_findings
    from slagen.doctor import checks

    findings = checks.examine()
    show_findings(findings, as_json)
    if require_gpu:
        checks.check_gpu(findings)
