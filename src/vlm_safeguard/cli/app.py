"""The commands, put together."""

from __future__ import annotations

import typer

from vlm_safeguard.cli import (
    ask,
    demo,
    doctor,
    evaluate,
    families,
    fit,
    inspect,
    playground,
    pocket,
    report,
    serve,
)

app = typer.Typer(
    name="vlm-safeguard",
    help="Keep open vision-language models as safe with an image as they are without one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("fit")(fit.fit)
app.command("eval")(evaluate.evaluate)
app.command("ask")(ask.ask)
app.command("serve", context_settings={"allow_extra_args": True})(serve.serve)
app.command("playground")(playground.playground)
app.command("inspect")(inspect.inspect)
app.command("families")(families.families)
app.command("doctor")(doctor.doctor)
app.command("report")(report.report)
app.add_typer(pocket.app, name="pocket")
