"""The `personaline` command. Models and torch are imported inside the commands that need them, never here."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from app import __version__

cli = typer.Typer(help="A full-duplex speech model on a phone number.", no_args_is_help=True, add_completion=False)
download_cli = typer.Typer()
bench_cli = typer.Typer(help="Measure.", no_args_is_help=True)
cli.add_typer(download_cli, name="download")
cli.add_typer(bench_cli, name="bench")

USERS_FAULT = 2

_WEIGHTS_HELP = "auto, bf16, int8, fp8 or int4; PERSONAPLEX_WEIGHTS otherwise."
_KV_HELP = "How keys and values are kept: auto, bf16, int8 or fp8; PERSONAPLEX_KV otherwise."
_NO_GRAPHS_HELP = "Start every operation by itself, to look for faults; PERSONAPLEX_GRAPHS=0."

Weights = Literal["bf16", "int8", "fp8", "int4"]
Kv = Literal["bf16", "int8", "fp8"]


def fail(message: object) -> NoReturn:
    """Say in one line (or a line a fault) what is wrong, and stop with exit code 2."""
    typer.secho(f"personaline: {message}", err=True, fg=typer.colors.RED)
    raise typer.Exit(USERS_FAULT)


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on; HOST otherwise.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; PORT otherwise.")] = None,
    weights: Annotated[str | None, typer.Option(help=_WEIGHTS_HELP)] = None,
    kv: Annotated[str | None, typer.Option(help=_KV_HELP)] = None,
    no_graphs: Annotated[bool, typer.Option("--no-graphs", help=_NO_GRAPHS_HELP)] = False,
) -> None:
    """Answer calls."""
    from app.engine import EngineFault
    from app.model_files import ModelFileFault
    from app.personas import PersonaFaults
    from app.server import PortFault, run
    from app.settings import SettingsFault, load_settings, misspelt
    from app.store import StoreFault

    try:
        settings = load_settings(
            host=host, port=port, personaplex_weights=weights, personaplex_kv=kv,
            personaplex_graphs=False if no_graphs else None,
        )  # fmt: skip
        start_log(settings.log_level)
        for line in misspelt(os.environ):
            logging.getLogger("personaline").warning(line)
        run(settings)
    except (SettingsFault, StoreFault, PersonaFaults, ModelFileFault, EngineFault, PortFault) as fault:
        fail(fault)


def start_log(level: str) -> None:
    """One line an event, on standard error. Libraries are heard from warnings up."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr
    )
    for name in ("personaline", "uvicorn.error"):
        logging.getLogger(name).setLevel(level.upper())


@cli.command()
def check(path: Annotated[Path | None, typer.Argument(help="A persona file or a folder of them.")] = None) -> None:
    """Check persona files: every fault of every file, in one report."""
    from app.personas import check as check_personas
    from app.settings import SettingsFault, load_settings

    try:
        report = check_personas(path or load_settings().personas_dir)
    except SettingsFault as fault:
        fail(fault)
    for line in report.lines():
        typer.echo(line)
    raise typer.Exit(USERS_FAULT if report.faults else 0)


@cli.command()
def call(
    wav: Annotated[list[Path], typer.Option(help="What to say; more than one are said in turn.")],
    url: Annotated[str, typer.Option(help="The service, ws:// or wss://.")] = "ws://127.0.0.1:8000",
    persona: Annotated[str, typer.Option(help="Who shall answer; the called number decides otherwise.")] = "",
    out: Annotated[Path | None, typer.Option(help="A folder for call.wav and summary.json.")] = None,
) -> None:
    """Call a service as Twilio would, say recordings, and listen until the agent has finished.

    Requests are signed with TWILIO_AUTH_TOKEN, for the address in PUBLIC_URL or else for --url.
    """
    from app.settings import SettingsFault, load_settings
    from app.simulate.caller import OutFault, place_call
    from app.simulate.twilio import CallFault
    from app.simulate.wavs import WavFault

    try:
        settings = load_settings()
        token = settings.twilio_auth_token
        result = asyncio.run(
            place_call(
                url,
                wav,
                persona=persona,
                token=token.get_secret_value() if token else "",
                public_url=settings.public_url or "",
                out=out,
                progress=typer.echo,
            )
        )
    except (SettingsFault, CallFault, WavFault, OutFault) as fault:
        fail(fault)
    raise typer.Exit(0 if all(turn.answered for turn in result.turns) else 1)


@cli.command()
def doctor() -> None:
    """Look at what PersonaPlex needs: packages, files, token, device, memory. Loads no weights."""
    from app.doctor import examine
    from app.settings import SettingsFault, load_settings

    colours = {"OK": typer.colors.GREEN, "WARN": typer.colors.YELLOW, "FAIL": typer.colors.RED}
    failed = False
    try:
        for finding in examine(load_settings()):
            typer.secho(str(finding), fg=colours[finding.level])
            failed |= finding.level == "FAIL"
    except SettingsFault as fault:
        fail(fault)
    raise typer.Exit(USERS_FAULT if failed else 0)


@cli.command()
def offline(
    input_wav: Annotated[list[Path], typer.Option(help="What a caller says; several are answered as one batch.")],
    output_wav: Annotated[list[Path], typer.Option(help="What the agent says, as long as the input; one for each.")],
    output_text: Annotated[list[Path], typer.Option(help="Its words as JSON, frame by frame; one for each.")],
    persona: Annotated[str | None, typer.Option(help="Who answers; the default persona otherwise.")] = None,
    text_prompt: Annotated[str | None, typer.Option(help="The role, in place of a persona's.")] = None,
    voice_prompt: Annotated[str | None, typer.Option(help="A voice's name, or a .pt or .wav file.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="PERSONAPLEX_CHECKPOINT otherwise.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, mps or cpu; PERSONAPLEX_DEVICE otherwise.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float32 or float16; PERSONAPLEX_DTYPE.")] = None,
    weights: Annotated[str | None, typer.Option(help=_WEIGHTS_HELP)] = None,
    kv: Annotated[str | None, typer.Option(help=_KV_HELP)] = None,
    no_graphs: Annotated[bool, typer.Option("--no-graphs", help=_NO_GRAPHS_HELP)] = False,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same answer.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
) -> None:
    """Let PersonaPlex answer recordings: wav in (any rate; channels are mixed), wav at 24 kHz and text out."""
    from app.engine import EngineFault
    from app.offline import OfflineFault, answer_recordings, pair, role_for
    from app.personas import PersonaFaults
    from app.settings import SettingsFault, load_settings
    from app.wav import WavFault

    try:
        recordings = pair(input_wav, output_wav, output_text)
        settings = load_settings(
            personaplex_checkpoint=checkpoint, personaplex_device=device, personaplex_dtype=dtype,
            personaplex_weights=weights, personaplex_kv=kv, personaplex_graphs=False if no_graphs else None,
        )  # fmt: skip
        role = role_for(settings, persona, text_prompt, voice_prompt)
        plan = answer_recordings(settings, recordings, role, seed, greedy)
    except (SettingsFault, PersonaFaults, OfflineFault, WavFault, EngineFault) as fault:
        fail(fault)
    typer.echo(f"answered by {plan}")


@cli.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the recording, transcript and figures go.")] = Path("demo-out"),
) -> None:
    """Phone the service on this machine and talk with it: seven questions, an interruption, a backchannel."""
    from app.demo import run_demo

    raise typer.Exit(asyncio.run(run_demo(out)))


@bench_cli.command("gateway")
def bench_gateway(
    calls: Annotated[str, typer.Option(help="How many calls at once, in turn.")] = "1,24,64,160",
    seconds: Annotated[float, typer.Option(help="How long to measure each.")] = 20.0,
) -> None:
    """What the line alone costs: CPU seconds a call-minute with the echo engine."""
    import tempfile

    from app import bench
    from app.simulate.service import ServiceFault
    from app.simulate.twilio import CallFault

    try:
        counts = [int(count) for count in calls.split(",")]
    except ValueError:
        fail(f"--calls: found {calls!r}; numbers such as 1,24,64,160 are right")
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = asyncio.run(
                bench.bench_gateway(counts, seconds, Path(folder), lambda text: typer.echo(text, err=True))
            )
        except (ServiceFault, CallFault) as fault:
            fail(fault)
    for line in bench.table(rows):
        typer.echo(line)


@bench_cli.command("beat")
def bench_beat(
    calls: Annotated[str, typer.Option(help="How many calls at once, in turn.")] = "0,75",
    gpu_ms: Annotated[float, typer.Option(help="What a tick of the modelled GPU takes.")] = 40.0,
    seconds: Annotated[float, typer.Option(help="How long each run measures.")] = 10.0,
    runs: Annotated[int, typer.Option(min=1, help="How often, for their medians.")] = 3,
) -> None:
    """What live sockets cost the engine's tick, in the service's process and in its own; ways to keep the beat."""
    import tempfile

    from app import bench_beat
    from app.simulate.service import ServiceFault
    from app.simulate.twilio import CallFault

    try:
        counts = [int(count) for count in calls.split(",")]
    except ValueError:
        fail(f"--calls: found {calls!r}; numbers such as 0,75 are right")
    with tempfile.TemporaryDirectory() as folder:
        try:
            rows = asyncio.run(
                bench_beat.bench_beat(
                    counts, gpu_ms, seconds, runs, Path(folder), lambda text: typer.echo(text, err=True)
                )
            )
        except (ServiceFault, CallFault) as fault:
            fail(fault)
    for line in [*bench_beat.table(rows, gpu_ms, runs), *bench_beat.ways([1, 16, 32, 64, 75])]:
        typer.echo(line)


@bench_cli.command("engine")
def bench_engine(
    calls: Annotated[str, typer.Option(help="How many calls at once, in turn.")] = "1,8,16,32,64,96,128",
    context: Annotated[str, typer.Option(help="How many positions each of them has, in turn.")] = "750,1500,3000",
    weights: Annotated[Weights, typer.Option(help="How weights are kept.")] = "bf16",
    kv: Annotated[Kv, typer.Option(help="How keys and values are kept.")] = "int8",
    frames: Annotated[int, typer.Option(help="How many ticks of each are measured.")] = 200,
    checkpoint: Annotated[Path | None, typer.Option(help="Random weights of the real size otherwise.")] = None,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option()] = "auto",
    no_graphs: Annotated[bool, typer.Option("--no-graphs", help="Start every operation by itself.")] = False,
    memory: Annotated[float | None, typer.Option(metavar="GB", help="Let it have no more of the GPU.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw ms a tick against calls.")] = None,
) -> None:
    """What a tick of PersonaPlex costs here: time against the roofline, memory, the start of a call, and loading."""
    from app import bench_plot
    from app.engine import EngineFault
    from app.machine import require_packages

    try:
        require_packages()
        if plot is not None:
            bench_plot.require_matplotlib()
        from app.engine.personaplex.bench.report import as_json, as_lines
        from app.engine.personaplex.bench.run import Options, numbers, run, write

        options = Options(
            numbers("--calls", calls), numbers("--context", context), weights, kv, frames, checkpoint,
            device, not no_graphs, memory,
        )  # fmt: skip
        with steps_bar() as progress:
            report = run(options, progress)
        if json_file is not None:
            write(json_file, as_json(report))
        for line in as_lines(report):
            typer.echo(line)
        if plot is not None:
            bench_plot.plot(report, plot)
    except EngineFault as fault:
        fail(fault)


@bench_cli.command("quality")
def bench_quality(
    checkpoint: Annotated[Path | None, typer.Option(help="PERSONAPLEX_CHECKPOINT otherwise.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="How long the call is, in frames of 80 ms.")] = 250,
    weights: Annotated[str, typer.Option(help="Kinds of weights to compare with bf16.")] = "int8,fp8,int4",
    kv: Annotated[str, typer.Option(help="Kinds of keys and values to compare with bf16.")] = "int8,fp8",
    persona: Annotated[str | None, typer.Option(help="Who answers; the default persona otherwise.")] = None,
    wav: Annotated[Path | None, typer.Option(help="What the caller says; silence and noise otherwise.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE")] = None,
) -> None:
    """What fewer bytes cost in quality: one call, heard again by the model in each kind of weights and of keys."""
    from app import bench_quality
    from app.engine import EngineFault
    from app.offline import OfflineFault
    from app.personas import PersonaFaults
    from app.settings import SettingsFault, load_settings
    from app.wav import WavFault

    try:
        settings = load_settings(personaplex_checkpoint=checkpoint)
        with steps_bar() as progress:
            lines = bench_quality.measure(settings, persona, wav, frames, weights, kv, json_file, progress)
    except (SettingsFault, PersonaFaults, OfflineFault, WavFault, EngineFault) as fault:
        fail(fault)
    for line in lines:
        typer.echo(line)


@contextmanager
def steps_bar() -> Iterator[Callable[[str, int, int], object]]:
    """A progress bar on standard error: what is being done, how many steps are done, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("")
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)


@bench_cli.command("moshi")
def bench_moshi() -> None:
    """What a step of PersonaPlex's language model costs on this CPU, beside moshi 0.2.13 where that is installed."""
    from app import bench_moshi
    from app.engine import EngineFault

    try:
        cost = bench_moshi.bench_moshi(lambda text: typer.echo(text, err=True))
    except EngineFault as fault:
        fail(fault)
    for line in bench_moshi.table(cost):
        typer.echo(line)


@cli.command()
def version() -> None:
    """Say which version this is."""
    typer.echo(__version__)


@download_cli.callback(invoke_without_command=True)
def download(context: typer.Context) -> None:
    """Get PersonaPlex's model files (17.1 GB, once), or with `cascade` the embedded engine's."""
    if context.invoked_subcommand is not None:
        return
    from app.engine import EngineFault
    from app.engine.personaplex.voices import unpack_voices
    from app.settings import SettingsFault, load_settings
    from app.weights_hub import PERSONAPLEX, HubFault, fetch, usable_token

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        folder = fetch(PERSONAPLEX, usable_token(load_settings().hf_token), typer.echo)
        unpack_voices(folder / "voices.tgz", folder / "voices")
    except (SettingsFault, HubFault, EngineFault) as fault:
        fail(fault)
    typer.echo(f"ready: {folder}")


@download_cli.command("cascade")
def download_cascade(
    from_file: Annotated[Path | None, typer.Option(help="A copy that you have, for machines without network.")] = None,
) -> None:
    """Get the language model of the embedded engine (1.1 GB, once)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from app import model_files

    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("language model", total=model_files.LLM.size_bytes)

        def report(progress: model_files.Progress) -> None:
            bar.update(task, completed=progress.done_bytes, total=progress.total_bytes, description=progress.stage)

        try:
            folder = model_files.models_folder()
            if from_file is not None:
                path = model_files.take_file(model_files.LLM, from_file, folder, report)
            else:
                path = model_files.download(model_files.LLM, folder, report)
        except model_files.ModelFileFault as fault:
            bar.stop()
            fail(fault)
    typer.echo(f"ready: {path}")


def main() -> None:
    """The entry point: Ctrl-C ends quietly."""
    try:
        cli()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
