"""The command `doctor`."""

from typing import Annotated

import typer

from slagen.errors import UsageError


def doctor(
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Compile every kernel for every card: shared memory, registers, spills, instructions, copies in "
            "flight, and an estimate of the operator's time.",
        ),
    ] = False,
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest",
            help="Try kernels, a video of the bundled model and a short bench, in under five minutes on a card, and "
            "write one JSON file to attach to an issue. Exits with code 6 where a check fails, and with code 4 where "
            "this machine lacks what one takes.",
        ),
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(help="The file of --selftest. [default: slagen-selftest-<date>.json]", show_default=False),
    ] = None,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Exit with code 4 where there is no usable GPU.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Say what this machine can do, and how to fix what it cannot.

    Example: slagen doctor --selftest
    """
    from slagen.cli import console
    from slagen.cli.output.doctor import show_findings, show_selftest
    from slagen.cli.output.kernels import show_kernels
    from slagen.doctor import checks, kernel_costs

    if kernels and selftest:
        raise UsageError("--kernels and --selftest are two things. Give one of them.")
    if output is not None and not selftest:
        raise UsageError("--output is the file of --selftest, which is not given.")
    if selftest:
        from slagen.doctor import selftest as trials

        path = trials.claim(output)
        content = trials.selftest(console.note)
        trials.write(content, path)
        show_selftest(content, path, as_json)
        trials.check(content)
        return
    if kernels:
        content = kernel_costs.kernel_costs(console.note)
        show_kernels(content, as_json)
        kernel_costs.check_kernels(content)
        return
    findings = checks.examine()
    show_findings(findings, as_json)
    if require_gpu:
        checks.check_gpu(findings)
