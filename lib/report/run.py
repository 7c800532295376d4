"""Owns the run of the study: its plan, notebooks in order and their kernels, where the time goes, pages and index."""

from __future__ import annotations

import difflib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

import pandas as pd
from jupyter_client.manager import AsyncKernelManager

from lib.paths import DATA, NOTEBOOKS, PACKAGE, PROJECT, REPORTS, ROOT, RUNS, digest_of, file_digest, write_json
from lib.report.exhibits import StudyError, duration, provenance
from lib.settings import Settings, SettingsError

sys.modules.setdefault("rfc3987_syntax", None)
"""jsonschema, which checks notebooks, would build a grammar of web addresses from it, for two seconds."""
KINDS = ("data", "training", "scoring", "statistics", "drawing")
"""Of work, as `lib.paths.clocked` names them."""
DISK = {"smoke": 0.8e9, "study": 3e9, "full": 6e9, "paper": 60e9}
"""Bytes below STUDY_ROOT after a run of each preset, the packages of the embedded corpora (480 MB) included."""
WARM = ("ipykernel.kernelapp", "seaborn", "sklearn.metrics", "lib.report.run", "lib.study")
"""What a forked kernel has imported before."""


def notebooks(only: tuple[str, ...] = (), start: str = "") -> list[Path]:
    """The numbered notebooks in order; `only` and `start` take numbers such as 31. Raises StudyError for an unknown."""
    paths = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    known = [path.name[:2] for path in paths]
    if unknown := [number for number in (*only, *filter(None, [start])) if number[:2] not in known]:
        raise StudyError(f"no notebook has the number {unknown[0]}; there are {', '.join(known)}")
    chosen = [path for path in paths if not only or path.name[:2] in {number[:2] for number in only}]
    return [path for path in chosen if path.name[:2] >= start[:2]]


def code_digest(paths: list[Path]) -> str:
    """Hash of `paths` and of the library's code without the command: a stage runs again when it changes."""
    library = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("cli.py", "__main__.py"))
    return digest_of([(path.name, file_digest(path)) for path in [*library, *paths]])


def run_study(settings: Settings, changes: dict[str, str], only: tuple[str, ...] = (), start: str = "",
              force: bool = False, say: Callable[[str], None] = print) -> Path:
    """Execute the notebooks in order and write the HTML reports and the index; returns the index's path.

    A stage is skipped when its notebook, the library, the settings and the stages before it are unchanged. Raises
    StudyError where a notebook fails, with the path of the partly executed notebook; everything before it is kept.
    """
    chosen, every = {path.name for path in notebooks(only, start)}, notebooks()
    options = ",".join(f"{name}={value.replace(',', '+')}" for name, value in sorted(changes.items()) if name != "seed")
    parameters = {"preset": settings.preset, "seed": settings.seed, "options": options}
    earlier, started = "", time.time()
    for number, path in enumerate(every, start=1):
        target = REPORTS / "executed" / path.name
        # The summary reads the tables of all others, so what comes before a stage is part of its key.
        key = earlier = digest_of([earlier, code_digest([path]), settings.digest(), sorted(changes.items())])
        stamp = _stamp(settings, path)
        fresh = stamp.get("key") == key and target.exists() and stamp.get("executed") == file_digest(target)
        if path.name not in chosen:
            continue
        line = f"[{number:2d}/{len(every)}] {path.stem}: "
        if fresh and not force:
            say(line + "unchanged, skipped")
            continue
        say(line + "running ...")
        times = RUNS / settings.preset / "times" / f"{path.stem}.jsonl"
        times.parent.mkdir(parents=True, exist_ok=True)
        times.unlink(missing_ok=True)
        began = time.time()
        execute(path, target, checked_parameters(path, parameters), times)
        row = {"key": key, "executed": file_digest(target)} | _seconds(target, times, began, time.time())
        write_json(RUNS / settings.preset / "stamps" / f"{path.stem}.json", row)
        say(line + f"done in {row['seconds']:.0f} s")
    index = write_reports(settings)
    say(f"study finished in {time.time() - started:.0f} s; open {index}")
    return index


def run_notebook(path: Path, parameters: dict[str, object], page: Path, trail: dict[str, object] | None = None) -> str:
    """Execute one notebook with `parameters` in the folder of the notebooks, write it as the HTML page `page`, which
    needs no network, with `trail` as its footer, and return its finding. File names among the parameters are absolute.
    Raises SettingsError for a parameter that the notebook does not know, StudyError where a cell fails."""
    checked_parameters(path, parameters)
    threading.Thread(target=importlib.import_module, args=("lib.report.html",)).start()  # while the kernel works
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / path.name
        try:
            execute(path, executed, parameters)
        except StudyError as error:
            raise StudyError(str(error).partition("\n")[0]) from None  # nothing of it is kept
        from lib.report import html

        html.export_notebook(executed, page, provenance=trail, index="")
        return html.notebook_facts(executed)["finding"].removeprefix("**Finding.** ")


def checked_parameters(path: Path, parameters: dict[str, object]) -> dict[str, object]:
    """`parameters`, which the notebook's cell tagged so must know by name and annotated type. Raises SettingsError for
    an unknown name, naming the nearest, and for a value of another type."""
    import papermill

    known = {name: entry["inferred_type_name"] for name, entry in papermill.inspect_notebook(path).items()}
    if not known:
        raise StudyError(f"{path.name} has no cell tagged 'parameters'")
    for name, value in parameters.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SettingsError(f"{path.name} has no parameter {name!r}; the nearest known one is {near!r}")
        if type(value).__name__ not in {"float": ("float", "int")}.get(known[name], (known[name],)):
            raise SettingsError(f"parameter {name!r} of {path.name} takes a value of type {known[name]}, not {value!r}")
    return parameters


def execute(path: Path, target: Path, parameters: dict[str, object], times: Path | None = None) -> None:
    """Execute the notebook `path` as `target`. With a file for its `times` (lib.paths.clocked), as one of several, its
    kernel is forked from a process that has imported libraries and done nothing else, where the system can do that.
    Raises StudyError where a cell or the kernel fails."""
    os.environ |= {
        "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel is this environment's own Python, not one registered for the user
        "PYDEVD_DISABLE_FILE_VALIDATION": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "STUDY_ROOT": str(ROOT), "STUDY_TIMES": str(times or ""),
        # Its lib is this one, installed or not.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])))}
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    target.parent.mkdir(parents=True, exist_ok=True)
    partly = target.with_name(f"{path.stem}.partial.ipynb")
    execution = partial(papermill.execute_notebook, path, partly, parameters, kernel_name="python3", cwd=NOTEBOOKS,
                        log_output=False, progress_bar=sys.stderr.isatty(),
                        extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
    try:
        try:
            execution(kernel_manager_class=WarmKernels if times and sys.platform == "linux" else AsyncKernelManager)
        except DeadKernelError:
            raise
        except RuntimeError:  # the forked kernel did not answer
            execution(kernel_manager_class=AsyncKernelManager)
    except (PapermillExecutionError, DeadKernelError) as error:
        reason = "its process ended, perhaps for want of memory"
        if isinstance(error, PapermillExecutionError):
            reason = f"failed in cell {error.exec_count}: {error.ename}: {error.evalue}"
        raise StudyError(f"{path.name} {reason}\nthe partly executed notebook is {partly}; earlier stages are kept, "
                         "run the same command to go on") from None
    finally:
        os.environ["STUDY_TIMES"] = ""
    os.replace(partly, target)


class WarmKernels(AsyncKernelManager):
    """Starts kernels by forking a process that has imported `WARM`; as usual where that fails."""

    async def _async_launch_kernel(self, kernel_cmd: list[str], **named: object) -> None:
        multiprocessing.get_context("forkserver").set_forkserver_preload(list(WARM))
        arguments = kernel_cmd[kernel_cmd.index("ipykernel_launcher") + 1 :]
        kernel = WarmKernel(args=(arguments, os.getcwd(), dict(os.environ)))
        try:
            kernel.start()
        except (OSError, EOFError):
            return await super()._async_launch_kernel(kernel_cmd, **named)
        local = self.provisioner
        local.process, local.pid, local.pgid = kernel, kernel.pid, kernel.pid
        self._reconcile_connection_info(local.connection_info)


class WarmKernel(multiprocessing.context.ForkServerProcess):
    """A kernel in a forked process; its methods are what jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> None:
        self.join()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end_with_runner(self) -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    def run(self) -> None:
        arguments, folder, environment = self._args
        os.setsid()  # Ctrl-C in a terminal reaches the runner alone, which interrupts its kernels
        os.chdir(folder)
        os.environ |= environment
        threading.Thread(target=self.end_with_runner, daemon=True).start()
        from ipykernel.kernelapp import IPKernelApp

        IPKernelApp.launch_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        with open(environment["STUDY_TIMES"], "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"kind": "peak", "seconds": 0, "mb": round(max(peaks) / 1000)}) + "\n")


def _stamp(settings: Settings, path: Path) -> dict[str, object]:
    """What is known of a notebook's last run: key, seconds, seconds of each kind of work. Empty where it never ran."""
    file = RUNS / settings.preset / "stamps" / f"{path.stem}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _seconds(executed: Path, times: Path, began: float, ended: float) -> dict[str, object]:
    """Seconds of an executed notebook, of each kind of work in it (`times`, lines of `lib.paths.clocked`), and its peak
    memory. `start` is what passes until its first cell after the parameters, which imports the libraries, is done."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    code = [cell["metadata"] for cell in cells if cell["cell_type"] == "code"]
    first = next(cell for cell in code if not {"parameters", "injected-parameters"} & set(cell.get("tags", [])))
    ready = datetime.fromisoformat(first["papermill"]["end_time"]).timestamp()
    lines = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()] if times.exists() else []
    kinds = {kind: sum(line["seconds"] for line in lines if line["kind"] == kind) for kind in KINDS}
    kinds["start"] = ready - began - sum(line["seconds"] for line in lines if line.get("end", 0) <= ready)
    kinds["other"] = ended - began - sum(kinds.values())
    return {"seconds": round(ended - began, 1), "kinds": {kind: round(value, 1) for kind, value in kinds.items()},
            "peak_mb": next((line["mb"] for line in lines if line["kind"] == "peak"), None)}


def stage_times(settings: Settings) -> pd.DataFrame:
    """Where the time went: a row a notebook that ran at this preset, in seconds of each kind of work."""
    rows = [{"stage": path.stem, "seconds": stamp["seconds"], "peak": stamp.get("peak_mb")} | stamp.get("kinds", {})
            for path in notebooks() if (stamp := _stamp(settings, path))]
    table = pd.DataFrame(rows, columns=["stage", "seconds", "start", *KINDS, "other", "peak"]).astype({"peak": float})
    table.loc[len(table)] = {**table.sum(numeric_only=True), "stage": "all", "peak": table.peak.max()}
    return table.rename(columns={"start": "start and imports", "peak": "peak memory (MB)"})


def planned(settings: Settings, only: tuple[str, ...] = (), start: str = "") -> list[str]:
    """The notebooks that would run, in words, a line each, with their time on two cores: that of the last run, or else
    what the notebook's metadata state (`seconds` at each preset). Raises StudyError where the disk is too small."""
    lines, total = [], 0.0
    for path in notebooks(only, start):
        stated = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("seconds", {}).get(settings.preset)
        measured = _stamp(settings, path).get("seconds")
        seconds, source = (measured, "measured") if measured else (stated, "stated")
        lines.append(f"{path.stem:26s} " + (f"{duration(seconds):>9s}  {source}" if seconds else "  unknown"))
        total += seconds or 0
    return [*lines, f"{'time':26s} {duration(total):>9s}  on two cores, without what is cached already",
            f"{'disk':26s} {require_disk(settings) / 1e9:6.1f} GB  more below {ROOT}"]


def require_disk(settings: Settings) -> float:
    """Bytes that a run of this preset will still write. Raises StudyError where the disk is too small for them."""
    files = [path for folder in (DATA, RUNS / settings.preset) for path in folder.rglob("*") if path.is_file()]
    lacking = max(5e7, DISK[settings.preset] - sum(path.stat().st_size for path in files))
    free = shutil.disk_usage(next(folder for folder in (ROOT, *ROOT.parents) if folder.exists())).free
    if free < lacking:
        raise StudyError(f"the study needs {lacking / 1e9:.1f} GB more of disk below {ROOT}, where {free / 1e6:.0f} MB "
                         "are free; point STUDY_ROOT to a larger disk, or take --preset smoke")
    return lacking


def write_reports(settings: Settings) -> Path:
    """HTML of every executed notebook and the index; returns the path of the index. Pages are left as they are where
    nothing that they show has changed and nobody has touched them."""
    executed = [path for path in (REPORTS / "executed" / path.name for path in notebooks()) if path.exists()]
    tables = sorted((REPORTS / "tables").glob("*.json"), key=lambda path: path.stat().st_mtime)
    data = json.loads(tables[-1].read_text(encoding="utf-8"))["provenance"]["data"] if tables else "none yet"
    times = stage_times(settings).to_html(index=False, border=0, na_rep="", float_format="{:.0f}".format)
    trail = provenance(settings, data)
    headline, figure = REPORTS / "tables" / "50_headline.csv", REPORTS / "figures" / "50_headline.png"
    words = figure.with_suffix(".txt")
    sources = [*executed, *(path for path in (headline, figure, words) if path.exists())]
    templates = sorted(path for path in PACKAGE.glob("report/templates/**/*") if path.is_file())
    index, pages = REPORTS / "index.html", [REPORTS / "html" / f"{path.stem}.html" for path in executed]
    key = digest_of([[(path.name, file_digest(path)) for path in sources], code_digest(templates), trail, times])

    def state() -> dict[str, object]:
        return {"key": key, "pages": [file_digest(path) if path.exists() else "" for path in (index, *pages)]}

    if _stamp(settings, Path("reports")) == state():
        return index
    from lib.report import html  # seconds that an unchanged run need not spend

    facts, entries = [html.notebook_facts(path) for path in executed], []
    around = [None, *((page.name, fact["title"]) for page, fact in zip(pages, facts)), None]
    for number, (path, page, fact) in enumerate(zip(executed, pages, facts)):
        html.export_notebook(path, page, provenance=trail, previous=around[number], next=around[number + 2])
        title = fact["title"].removeprefix(path.name[:2]).strip()
        entries.append(fact | {"number": path.name[:2], "href": f"html/{page.name}", "title": title})
    table = pd.read_csv(headline) if headline.exists() else pd.DataFrame()
    rows = "" if table.empty else table.to_html(index=False, na_rep="", border=0, float_format="{:.2f}".format)
    picture = (figure, words.read_text(encoding="utf-8").strip()) if figure.exists() else None
    html.write_index(index, entries, picture, trail, headline=rows, times=times)
    write_json(RUNS / settings.preset / "stamps" / "reports.json", state())
    return index
