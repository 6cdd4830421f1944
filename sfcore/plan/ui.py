"""A page that checks a run before it starts, and what other people's Gradio apps need for the same.

Needs Gradio, `pip install 'schedulefree-twin[ui]'`, which the first call imports. Nothing is fetched from
other machines, or sent to them.
"""

from __future__ import annotations

import ipaddress
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sfcore.plan import _check, _config, _form, _page, _text
from sfcore.plan._config import SourceName
from sfcore.plan._form import Form, Row
from sfcore.plan._model import ConfigError, FieldState
from sfcore.plan._tables import FIELDS

if TYPE_CHECKING:
    from gradio import Blocks
    from gradio.components import Component

__all__ = ["Event", "Followed", "follow", "serve"]

EXAMPLE = """{
  "LoRA_type": "Standard",
  "optimizer": "AdamW8bit",
  "learning_rate": 0.0001,
  "lr_scheduler": "cosine",
  "lr_warmup": 10,
  "max_train_steps": 1600,
  "train_batch_size": 2
}"""
# Gradio's Textbox tells of keys that write something, and neither of the others nor of what is pasted.
_EVERY_INPUT = """() => document.addEventListener("input", (event) => {
  const field = event.target.closest("[id^=sf-]");
  if (field && field.id !== "sf-text") event.target.dispatchEvent(new KeyboardEvent("keypress"));
})"""
# By a class, for Gradio 6.17 shows nothing that was once not visible.
_GONE = ["sf-gone"]
_FORMS = ".json, .toml, .sh or .txt"


class Event(NamedTuple):
    """What a listener of Gradio takes: `button.click(*event)`.

    Attributes:
        fn: what runs.
        inputs, outputs: the components that it reads and writes.
    """

    fn: Callable[..., list[Any]]
    inputs: list[Component]
    outputs: list[Component]


class Memory(NamedTuple):
    """What `follow` remembers of a browser's session.

    Attributes:
        states: neutral field -> its state.
        emptied: components that are switched off -> the app's own value, which they hold for want of another.
    """

    states: Mapping[str, FieldState]
    emptied: Mapping[str, Any]


NOTHING = Memory({}, {})


class Followed(NamedTuple):
    """The events that keep the fields of an app in step with its choices.

    Attributes:
        change: for `.change` of every choice, such as the optimizer and the scheduler.
        load: after a preset was loaded; what was remembered of the one before is forgotten.
    """

    change: Event
    load: Event


def follow(
    components: Mapping[str, Component], *, source: SourceName | None = None, **facts: Any
) -> Followed:
    """Returns the events that disable what the choices of an app forbid, say why, and give the values back.

    Call it inside of the app's `with gr.Blocks()`. What a choice switches off shows why in the place of its
    `info`, holds what does no harm, 0 for a warm-up, and gets its value and its `info` back when the choice
    is undone. What is remembered belongs to one browser's session. What the app has switched off stays so.

    Args:
        components: the name that the trainer's own file has for a field -> the app's component, of all fields
            that matter: optimizer, scheduler, its warm-up and its other numbers, the optimizer's arguments.
        source: "kohya", "sd-scripts", "hf" or "own"; default None: told from the names.
        facts: as for `sfcore.plan.check`, for what no component says.

    Raises:
        ConfigError: if there is no component, or if a name is not text.
        ImportError: without Gradio.

    Example:
        >>> import gradio as gr  # doctest: +SKIP
        >>> with gr.Blocks() as app:  # doctest: +SKIP
        ...     optimizer = gr.Dropdown(["AdamW8bit", "AdamWScheduleFree"], label="Optimizer")
        ...     scheduler = gr.Dropdown(["constant", "cosine"], value="cosine", label="LR scheduler")
        ...     warmup = gr.Slider(0, 100, value=10, label="LR warmup (% of total steps)")
        ...     fields = {"optimizer": optimizer, "lr_scheduler": scheduler, "lr_warmup": warmup}
        ...     followed = follow(fields, source="kohya")
        ...     for choice in (optimizer, scheduler):
        ...         _ = choice.change(*followed.change)
    """
    gradio = _gradio()
    wrong = [name for name in components if not isinstance(name, str)]
    if wrong or not components:
        found = repr(wrong[0]) if wrong else "none"
        rule = "components must be field name -> component"
        raise ConfigError(f"{rule}, got {found}: name each as the trainer's own file does")
    memory = gradio.State(NOTHING)
    own = {name: (one.value, getattr(one, "info", None)) for name, one in components.items()}
    frozen = {name for name, one in components.items() if getattr(one, "interactive", None) is False}

    def moved(anew: bool, before: Memory, *values: Any) -> list[Any]:
        states, emptied = NOTHING if anew else before
        given = dict(zip(components, values, strict=True))
        told = {name: value for name, value in given.items() if value is not None}
        told = {name: value for name, value in told.items() if (name, value) not in emptied.items()}
        try:
            config, states = _form.settled(_config.read(told, source, facts), states)
        except ConfigError as error:
            gradio.Warning(_page.shown(error))
            return [before, *(gradio.skip() for _ in components)]
        named, now = _check.by_name(config, states), dict(config.original)
        off = [name for name in components if name in named and not named[name].enabled]
        emptied = {name: own[name][0] for name in off if now.get(name) is None and given[name] is not None}
        updates = [
            update(name, given[name], (now | emptied).get(name), named.get(name)) for name in components
        ]
        return [Memory(states, emptied), *updates]

    def update(name: str, given: Any, now: Any, state: FieldState | None) -> Any:
        changes: dict[str, Any] = {} if now == given else {"value": now}
        if state is not None:
            changes["info"] = own[name][1] if state.enabled else _plain(f"{state.reason}.")
            changes["interactive"] = state.enabled and name not in frozen
        return gradio.update(**changes)

    shown = list(components.values())
    change, load = (Event(partial(moved, anew), [memory, *shown], [memory, *shown]) for anew in (False, True))
    return Followed(change, load)


def serve(
    config: str | Path | None = None,
    *,
    source: SourceName | None = None,
    ignore: Iterable[str] = (),
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = False,
    told: Callable[[str], None] = print,
    wait: bool = True,
    **facts: Any,
) -> Blocks:
    """Serves the page until it is interrupted.

    Args:
        config: what it opens with: the path of a preset, a TOML or JSON file or a script, or a command line;
            default None: an example.
        source, ignore, facts: as for `sfcore.plan.check`.
        host: the address to listen at; default "127.0.0.1", which this machine alone reaches. At another one
            a command line may name no file of settings, for it would be one of this machine's.
        port: default None: the first free one from 7860.
        browser: open it in one.
        told: what is told the address.
        wait: return only when it is interrupted or closed; otherwise the page runs until its `close()`.

    Returns:
        The page, of Gradio's class.

    Raises:
        ConfigError: if the configuration cannot be read, or the host is no address.
        OSError: if the port is taken, or the host is not this machine's.
        ImportError: without Gradio.
    """
    local = _is_loopback(host)
    more: dict[str, Any] = {"source": source, "facts": facts, "ignore": list(ignore), "reads_files": local}
    text, suffix, name = _first(config)
    _form.opened(text, suffix, name, **more)  # what cannot be read is said now, not in every browser
    gradio, page = _gradio(), _Page(text, suffix, name, more).blocks
    theme = gradio.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
        radius_size="sm",
    )
    page.queue(api_open=False)
    try:
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                inbrowser=browser,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,
                ssr_mode=False,
                max_file_size=_form.LARGEST,
                theme=theme,
                css=_page.CSS,
            )
        except OSError as error:
            free = "from 7860 to 7959" if port is None else str(port)
            raise OSError(f"port must be free at {host}, got {free}: pass another") from error
        if not wait:
            told(address)
            return page
        with _interrupts() as came:
            told(address)
            while page.is_running and not came:
                time.sleep(0.1)
        page.close()
    except KeyboardInterrupt:  # while there is no handler yet, or any more: the page's threads would live on
        page.close()
        raise
    return page


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Yields what every Ctrl-C adds to; the exception that it else is gets lost in a destructor."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield came
        return
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        line = "pip install 'schedulefree-twin[ui]'"
        raise ImportError(f"a page needs the package gradio, which is not installed: {line}") from error
    return gradio


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise ConfigError(
            f"host must be an address, got {host!r}: pass 127.0.0.1, or 0.0.0.0 for all"
        ) from error


def _first(config: str | Path | None) -> tuple[str, str, str]:
    """Returns text, suffix and name of what the page opens with."""
    if config is None:
        return EXAMPLE, ".json", "example"
    if isinstance(config, str) and _config.is_command(config):
        return config, ".sh", "run"
    path = Path(config)
    return _text.read_text(path), path.suffix or ".json", path.stem


def _plain(text: str) -> str:
    """Returns text without links: Gradio takes an info for a line of Markdown; no more of it matters."""
    return text.replace("](", "]\u2060(")


class _Page:
    """The components, and what their events do. A browser's session holds a `Form`, and None at first."""

    def __init__(self, text: str, suffix: str, name: str, more: dict[str, Any]):
        self.first, self.more, self.gradio = (text, suffix, name), more, _gradio()
        with self.gradio.Blocks(title="schedulefree plan", analytics_enabled=False) as self.blocks:
            self.session = self.gradio.State(None)
            self.gradio.HTML(_page.piece("header", _page.HEADER))
            with self.gradio.Row(equal_height=False):
                with self.gradio.Column(scale=6, min_width=420):
                    self._draw_source()
                    self.fields = self._draw_fields()
                with self.gradio.Column(scale=5, min_width=380):
                    self._draw_plan()
            self._listen()

    def _draw_source(self) -> None:
        gradio = self.gradio
        self.text = gradio.Textbox(
            self.first[0],
            label="A preset, a TOML file or a command line",
            info="Kohya_SS, sd-scripts, musubi-tuner, Hugging Face TrainingArguments",
            lines=7,
            max_lines=7,
            elem_id="sf-text",
        )
        with gradio.Row():
            self.read = gradio.Button("Check it", variant="primary", size="md", elem_id="sf-read")
            self.file = gradio.UploadButton("Open a file …", size="md", elem_id="sf-open")
        self.refused = gradio.HTML(elem_id="sf-refused", elem_classes=_GONE)

    def _draw_fields(self) -> dict[str, Any]:
        gradio, found = self.gradio, {}
        for title, names in _form.GROUPS.items():
            opens = title != "Start from"
            with gradio.Group() if opens else gradio.Accordion(title, open=False), gradio.Row():
                for name in names:
                    found[name] = self._field(name)
        with gradio.Accordion("The optimizer's arguments", open=False), gradio.Row():
            for name in _form.arguments():
                found[name] = self._field(name)
        return found

    def _field(self, name: str) -> Any:
        gradio, shape = (
            self.gradio,
            {"elem_id": f"sf-{name}", "label": name, "elem_classes": _GONE, "min_width": 180},
        )
        if name in _form.GROUPS["Choices"]:
            return gradio.Dropdown([], allow_custom_value=True, interactive=True, **shape)
        if FIELDS[name].kind == "flag":
            return gradio.Checkbox(interactive=True, **shape)
        return gradio.Textbox(max_lines=1, interactive=True, **shape)

    def _draw_plan(self) -> None:
        gradio = self.gradio
        self.problems = gradio.HTML(elem_id="sf-problems")
        self.repair = gradio.Button(
            "Repair what needs no guess", size="md", elem_id="sf-repair", elem_classes=_GONE
        )
        self.changes = gradio.HTML(elem_id="sf-changes", elem_classes=_GONE)
        self.summary = gradio.HTML(elem_id="sf-summary")
        self.curves = gradio.HTML(elem_id="sf-curves")
        self.files = gradio.HTML(elem_id="sf-files")
        with gradio.Accordion("The file as it stands", open=False):
            self.now = gradio.Textbox(
                show_label=False, interactive=False, lines=8, max_lines=16, buttons=["copy"], elem_id="sf-now"
            )

    def _listen(self) -> None:
        gradio, everything = self.gradio, [self.session, *self.pieces, *self.fields.values()]
        # One at a time: each reads the session that the one before has written.
        usual: dict[str, Any] = {
            "outputs": everything,
            "show_progress": "hidden",
            "concurrency_id": "plan",
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        self.blocks.load(self.begin, [], js=_EVERY_INPUT, **usual)
        self.read.click(self.paste, [self.session, self.text], **usual)
        self.text.submit(self.paste, [self.session, self.text], **usual)
        self.file.upload(
            self.open, [self.session, self.file], **(usual | {"outputs": [self.text, *everything]})
        )
        self.repair.click(self.mend, [self.session], **usual)
        for name, one in self.fields.items():
            events = [one.input, *([one.blur, one.submit] if isinstance(one, gradio.Textbox) else [])]
            edit = partial(self.edit, name)
            gradio.on(events, edit, [self.session, one], trigger_mode="always_last", **usual)

    @property
    def pieces(self) -> list[Any]:
        """The components that show a plan."""
        return [
            *(self.refused, self.problems, self.repair, self.changes),
            *(self.summary, self.curves, self.files, self.now),
        ]

    def begin(self) -> list[Any]:
        """A browser has opened the page."""
        text, suffix, name = self.first
        return self.redrawn(None, lambda: _form.opened(text, suffix, name, **self.more))

    def paste(self, form: Form | None, text: str) -> list[Any]:
        """A text was pasted."""
        return self.redrawn(form, lambda: _form.opened(text or "", "", "run", **self.more), anew=True)

    def open(self, form: Form | None, path: str) -> list[Any]:
        """A file was opened."""
        found, given = "", Path(path)

        def read() -> Form:
            nonlocal found
            if given.suffix.lower() not in (".json", ".toml", ".sh", ".txt"):
                raise ConfigError(
                    f"{given.name} must be {_FORMS}, got {given.suffix or 'no suffix'}: open another"
                )
            found = _text.read_text(given, given.name)
            return _form.opened(found, given.suffix, given.stem, **self.more)

        drawn = self.redrawn(form, read, anew=True)
        return [found or self.gradio.skip(), *drawn]

    def mend(self, form: Form) -> list[Any]:
        """Everything is to be repaired."""
        return self.redrawn(form, lambda: _form.repaired(form))

    def edit(self, name: str, form: Form, value: Any) -> list[Any]:
        """A field was changed, or only left."""
        if self.look(name, _form.rows(form)[name])["value"] == value:
            return [form, *(self.gradio.skip() for _ in (*self.pieces, *self.fields))]
        return self.redrawn(form, lambda: _form.edited(form, name, value), edited=name)

    def redrawn(
        self, old: Form | None, make: Callable[[], Form], edited: str = "", anew: bool = False
    ) -> list[Any]:
        """Returns the session and what every component is to show, where it is not what it shows already."""
        skip, update = self.gradio.skip, self.gradio.update
        try:
            form = make()
            plan, files = form.plan, form.files
        except ConfigError as error:
            kept = [old, update(value=_page.refused(error), elem_classes=[])]
            return kept + [skip()] * (len(self.pieces) - 1 + len(self.fields))
        mends = any(problem.changes for problem in plan.problems)
        drawn = [
            update(value="", elem_classes=_GONE),
            update(value=_page.problems(plan)),
            update(elem_classes=[] if mends else _GONE),
            update(value=_page.changes(form.changes), elem_classes=[] if form.changes else _GONE),
            update(value=_page.summary(plan)),
            update(value=_page.pictures(plan)),
            update(value=_page.files(files)),
            update(value=next(iter(files.values()))),
        ]
        before = _form.rows(old) if old and not anew else {}
        rows = _form.rows(form)
        choices = {"optimizer": _form.optimizers(form.config), "scheduler": _form.schedulers()}
        for name, row in rows.items():
            look = {} if row == before.get(name) else self.look(name, row)
            if name == edited and row.enabled:
                look.pop("value", None)  # what somebody is typing is not written over
            if name in choices and look:
                look["choices"] = choices[name]
            drawn.append(update(**look) if look else skip())
        return [form, *drawn]

    def look(self, name: str, row: Row) -> dict[str, Any]:
        """Returns the properties of a field's component."""
        found: dict[str, Any] = {
            "label": row.label,
            "info": _plain(row.info),
            "interactive": row.enabled,
            "elem_classes": _GONE if not row.shown else [] if row.enabled else ["sf-off"],
        }
        if name in _form.GROUPS["Choices"]:
            value = row.default if row.value is None else row.value
            return found | {"value": "" if value is None else str(value)}
        if FIELDS[name].kind == "flag":
            return found | {"value": bool(row.value)}
        text = " ".join(map(str, row.value)) if isinstance(row.value, list) else row.value
        found["placeholder"] = "" if row.default is None else f"{row.default}"
        return found | {"value": "" if text is None else str(text)}
