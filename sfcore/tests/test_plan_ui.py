"""The page in a real browser, and `follow` in an app of its own.

With KOHYA_SS=CHECKOUT, every preset of a checkout of Kohya_SS is opened, and its own components are followed.
"""

import asyncio
import builtins
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

gradio = pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")

from sfcore import __main__  # noqa: E402
from sfcore.plan import ConfigError, check, ui  # noqa: E402
from sfcore.tests.test_plan_form import COMMAND, KOHYA, SD_TOML  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
KOHYA_SS = Path(os.environ.get("KOHYA_SS") or "none")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _closed_loops():
    """Closes the event loops that Gradio makes for every app and leaves open, which would be warnings."""
    loops, make = [], asyncio.new_event_loop

    def kept():
        loops.append(make())
        return loops[-1]

    asyncio.new_event_loop = kept
    yield
    asyncio.new_event_loop = make
    asyncio.set_event_loop(None)
    for loop in loops:
        if not loop.is_running():
            loop.close()


def example_code():
    text = (ROOT / "docs" / "form.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def example():
    """Returns the names that the example of docs/form.md defines."""
    names = {}
    exec(example_code(), names)
    return names


def told(updates):
    """Returns what an event tells the components, without those that it leaves alone."""
    return [{key: one[key] for key in one if key != "__type__"} for one in updates]


def test_the_example_of_the_page_disables_the_warm_up_and_gives_it_back():
    followed = example()["followed"]
    memory, *updates = followed.change.fn(ui.NOTHING, "AdamW8bit", "constant", 10)
    assert told(updates)[2] == {"info": "constant has no warm-up.", "interactive": False, "value": 0}
    memory, *updates = followed.change.fn(memory, "AdamW8bit", "cosine", 0)
    assert told(updates)[2] == {"info": None, "interactive": True, "value": 10}
    _, *updates = followed.change.fn(memory, "AdamW8bit", "cosine", 10)
    assert ["value" in one for one in told(updates)] == [False] * 3


def test_a_value_that_comes_back_enables_the_next():
    followed = example()["followed"]
    memory, *updates = followed.change.fn(ui.NOTHING, "AdamWScheduleFree", "cosine", 10)
    assert [one.get("value") for one in told(updates)] == [None, "constant", 0]
    _, *updates = followed.change.fn(memory, "AdamW8bit", "constant", 0)
    assert [one.get("value") for one in told(updates)] == [None, "cosine", 10]


def test_a_loaded_preset_forgets_what_was_remembered_of_the_one_before():
    followed = example()["followed"]
    memory, *_ = followed.change.fn(ui.NOTHING, "AdamW8bit", "constant", 10)
    memory, *_ = followed.load.fn(memory, "AdamW8bit", "constant", 0)
    _, *updates = followed.change.fn(memory, "AdamW8bit", "cosine", 0)
    assert "value" not in told(updates)[2]


def test_an_app_whose_fields_cannot_be_read_is_left_alone_with_a_warning(monkeypatch):
    warned = []
    monkeypatch.setattr(gradio, "Warning", warned.append)
    with gradio.Blocks():
        followed = ui.follow({"LoRA_type": gradio.Textbox(), "additional_parameters": gradio.Textbox()})
    memory, *updates = followed.change.fn(ui.NOTHING, "<b>", "--config_file <img src=x>")
    assert (memory, told(updates)) == (ui.NOTHING, [{}, {}])
    assert "must not have --config_file, got &#x27;&lt;img" in warned[0]


def test_what_an_app_has_switched_off_stays_so_and_what_has_no_value_gets_the_apps_own():
    with gradio.Blocks():
        fields = {
            "optimizer": gradio.Textbox(),
            "lr_scheduler": gradio.Textbox(),
            "lr_warmup": gradio.Number(interactive=False),
            "lr_scheduler_num_cycles": gradio.Number(1, info="restarts"),
        }
        followed = ui.follow(fields, source="kohya")
    memory, *updates = followed.change.fn(ui.NOTHING, "AdamW", "cosine_with_restarts", 10, 3)
    assert told(updates)[2]["interactive"] is False
    memory, *updates = followed.change.fn(memory, "AdamW", "linear", 10, 3)
    reason = "linear does not look at scheduler_cycles."
    assert told(updates)[3] == {"info": reason, "interactive": False, "value": 1}
    _, *updates = followed.change.fn(memory, "AdamW", "cosine_with_restarts", 10, 1)
    assert told(updates)[3] == {"info": "restarts", "interactive": True, "value": 3}


@pytest.mark.parametrize(("components", "found"), [({}, "none"), ({1: None}, "1")])
def test_components_without_names_are_refused(components, found):
    with pytest.raises(ConfigError, match=f"components must be field name -> component, got {found}"):
        ui.follow(components)


def test_a_link_in_a_reason_is_none():
    assert ui._plain("[a](https://example.org) has no b") == "[a]\u2060(https://example.org) has no b"


@pytest.fixture(scope="module")
def drawn():
    """The page without a server: its events, called by hand, tell each component what to show."""
    more = {"source": None, "facts": {}, "ignore": [], "reads_files": False}
    return ui._Page(ui.EXAMPLE, ".json", "example", more)


def looks(page, answer):
    """Returns field -> what its component is told, of those that are told anything."""
    fields = dict(zip(page.fields, told(answer[1 + len(page.pieces) :]), strict=True))
    return {name: look for name, look in fields.items() if look}


def test_the_events_of_the_page_do_what_a_browser_shows(drawn):
    form, *rest = drawn.begin()
    look = looks(drawn, [form, *rest])["scheduler_warmup_percent"]
    assert (look["label"], look["value"], look["interactive"]) == ("lr_warmup", "10", True)
    form, *rest = drawn.edit("scheduler", form, "constant")
    changed = looks(drawn, [form, *rest])
    on = {name for name, look in changed.items() if not look["elem_classes"]}
    assert on == {"scheduler"}
    assert "value" not in changed["scheduler"]  # it is what was just typed
    look = changed["scheduler_warmup_percent"]
    assert (look["value"], look["interactive"]) == ("0", False)
    assert look["info"] == "constant has no warm-up. 10 will come back."
    form, *rest = drawn.edit("scheduler", form, "cosine")
    assert looks(drawn, [form, *rest])["scheduler_warmup_percent"]["value"] == "10"


def test_a_field_that_is_only_left_changes_nothing(drawn):
    form, *_ = drawn.begin()
    again, *rest = drawn.edit("scheduler_warmup_percent", form, "10")
    assert again is form
    assert [one for one in told(rest) if one] == []


def test_where_others_reach_the_page_no_file_of_this_machine_is_read(drawn):
    form, *_ = drawn.begin()
    again, refused, *rest = drawn.paste(form, "train_network.py --config_file /etc/hosts.toml")
    assert again is form
    assert "the text must be whole, got --config_file" in refused["value"]
    assert [one for one in told(rest) if one] == []


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("192.168.1.2", False)],
)
def test_what_is_this_machine_alone(host, local):
    assert ui._is_loopback(host) == local


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "7999"], "--host and --port must be given with --ui"),
        (["--ui", "--json", "--strict"], "--ui must be alone, got --json, --strict"),
        (["--ui", "--host", "home"], "host must be an address, got 'home'"),
        (["nowhere.json", "--ui"], "nowhere.json must be a readable file, got No such file"),
        (["--ui", "--ignore", "SF1"], "ignore must be codes of rules, got 'SF1'"),
    ],
)
def test_a_wrong_command_line_opens_no_page(capsys, arguments, message):
    assert __main__.main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert __main__.main(["plan", "--ui"]) == 2
    assert "pip install 'schedulefree-twin[ui]'" in capsys.readouterr().err


@contextmanager
def server(*arguments, folder=ROOT):
    """The address of an app that a process of its own serves."""
    command = [sys.executable, *arguments]
    shape = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, **shape)
    try:
        lines = [""]
        while not lines[-1].startswith("http"):
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        yield lines[-1].split()[0]
    finally:
        process.kill()
        process.communicate()


LAUNCH = """
_, address, _ = app.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
print(address, flush=True)
app.block_thread()
"""


@pytest.fixture(scope="module")
def served():
    with server("-m", "sfcore", "plan", "--ui") as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
    if CHROMIUM is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(served, chromium):
    """A function that opens the page in a browser of its own; none may have asked elsewhere, or failed."""
    seen, contexts = [], []

    def open_page(address=served):
        context = chromium.new_context(viewport={"width": 1280, "height": 1000})
        page = context.new_page()
        page.on("request", lambda request: seen.append(request.url))
        page.on("dialog", lambda dialog: seen.append(f"dialog {dialog.message}"))
        page.on("pageerror", lambda error: seen.append(f"error {error}"))
        contexts.append(context)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    local = ("http://127.0.0.1", "data:", "blob:")
    assert [one for one in seen if not one.startswith(local)] == []


@pytest.fixture
def planned(opened):
    """A function that opens the page, and waits for its first plan."""

    def open_page():
        page = opened()
        expect(page.locator("#sf-summary dl")).to_be_visible(timeout=30_000)
        return page

    return open_page


def field(page, name):
    return page.locator(f"#sf-{name}").locator("textarea, input").first


def choose(page, name, value):
    page.locator(f"#sf-{name} input").click()
    page.get_by_role("option", name=value, exact=True).click()


def paste(page, text):
    page.locator("#sf-text textarea").fill(text)
    page.locator("#sf-read").click()


def open_file(page, path):
    page.locator("input[type=file]").set_input_files(path)


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


@SLOW
def test_constant_disables_the_warm_up_with_the_reason_and_cosine_gives_it_back(planned):
    page = planned()
    warmup = field(page, "scheduler_warmup_percent")
    expect(warmup).to_have_value("10")
    expect(warmup).to_be_enabled()
    curve = page.locator("#sf-curves polyline").get_attribute("points")
    choose(page, "scheduler", "constant")
    expect(warmup).to_be_disabled()
    expect(warmup).to_have_value("0")
    told = "constant has no warm-up. 10 will come back."
    expect(page.locator("#sf-scheduler_warmup_percent .info-text")).to_have_text(told)
    expect(page.locator("#sf-problems")).to_contain_text("No problems found")
    assert page.locator("#sf-curves polyline").get_attribute("points") != curve
    choose(page, "scheduler", "cosine")
    expect(warmup).to_be_enabled()
    expect(warmup).to_have_value("10")
    expect(page.locator("#sf-curves polyline")).to_have_attribute("points", curve)


@SLOW
def test_the_founding_story_is_shown_repaired_and_saved(planned):
    page = planned()
    paste(page, COMMAND.replace("cosine", "constant"))
    expect(page.locator("#sf-problems")).to_contain_text("1 error")
    expect(page.locator("#sf-problems")).to_contain_text("choose --lr_scheduler = constant_with_warmup")
    expect(field(page, "scheduler_warmup_steps")).to_be_disabled()
    page.locator("#sf-repair").click()
    expect(page.locator("#sf-changes")).to_contain_text("constant → constant_with_warmup")
    expect(field(page, "scheduler_warmup_steps")).to_be_enabled()
    with page.expect_download() as saved:
        page.get_by_text("Save run-checked.sh").click()
    assert saved.value.suggested_filename == "run-checked.sh"
    assert Path(saved.value.path()).read_text() == COMMAND.replace("cosine", "constant_with_warmup") + "\n"


@SLOW
def test_curves_follow_every_key_and_what_is_typed_is_not_written_over(planned):
    page = planned()
    paste(page, SD_TOML)
    expect(page.locator("#sf-summary")).to_contain_text("sd-scripts")
    rate = field(page, "lr")
    rate.fill("")
    rate.press_sequentially("2.50e-3", delay=30)
    expect(page.locator("#sf-curves")).to_contain_text("0.0025")
    expect(rate).to_have_value("2.50e-3")
    page.get_by_text("The file as it stands").click()
    expect(page.locator("#sf-now textarea")).to_have_value(re.compile("learning_rate = 0.0025"))


@SLOW
def test_two_browsers_have_forms_of_their_own(planned):
    first, second = planned(), planned()
    choose(first, "scheduler", "constant")
    expect(field(first, "scheduler_warmup_percent")).to_be_disabled()
    field(second, "scheduler_warmup_percent").fill("7")
    expect(second.locator("#sf-summary")).to_contain_text("112 optimizer steps")
    expect(field(second, "scheduler_warmup_percent")).to_be_enabled()
    choose(first, "scheduler", "linear")
    expect(field(first, "scheduler_warmup_percent")).to_have_value("10")


EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@SLOW
def test_html_is_shown_and_not_run(planned, tmp_path):
    page = planned()
    paste(page, json.dumps(KOHYA | {"optimizer": EVIL, "lr_scheduler": "constant", "lr_schedule": EVIL}))
    expect(page.locator("#sf-summary")).to_contain_text(EVIL)
    path = tmp_path / "<img src=x onerror=alert(3)>.json"
    path.write_text(json.dumps(KOHYA | {"optimizer": f"{EVIL}ScheduleFree", "learning_rate": EVIL}))
    open_file(page, path)
    expect(page.locator("#sf-scheduler .info-text")).to_contain_text(EVIL)
    expect(page.locator("#sf-problems")).to_contain_text(EVIL)
    paste(page, f'{{"optimizer": {EVIL}')
    expect(page.locator("#sf-refused")).to_contain_text("must be JSON")
    assert page.locator("img[src=x]").count() == 0
    page.wait_for_timeout(300)  # an alert would fail the fixture


@SLOW
def test_what_is_no_settings_is_refused_and_the_page_lives_on(planned, tmp_path):
    page, refused = planned(), "#sf-refused"
    for name, content, message in (
        (
            "photo.json",
            b"\x89PNG\r\n\x1a\n\0\0",
            "photo.json must be text in UTF-8, got another byte at line 1",
        ),
        ("run.yaml", b"a: 1", "run.yaml must be .json, .toml, .sh or .txt, got .yaml"),
        ("c.toml", "a = 1".encode("utf-16"), "c.toml must be text in UTF-8"),
        ("zero.json", b"\0" * 9, "zero.json must be JSON, got Expecting value at line 1, column 1"),
    ):
        (tmp_path / name).write_bytes(content)
        open_file(page, tmp_path / name)
        expect(page.locator(refused)).to_contain_text(message)
    (tmp_path / "big.json").write_bytes(b" " * (2**20 + 1))
    open_file(page, tmp_path / "big.json")
    expect(page.locator("[data-testid=toast-text]").first).to_contain_text("maximum allowed size of 1.0 M")
    choose(page, "scheduler", "constant")
    expect(field(page, "scheduler_warmup_percent")).to_be_disabled()


@SLOW
def test_a_preset_of_ten_thousand_lines_is_opened(planned, tmp_path):
    page, path = planned(), tmp_path / "long.json"
    fields = KOHYA | {f"learning_rate_{number}": number for number in range(10_000)}
    path.write_text(json.dumps(fields, indent=0))
    open_file(page, path)
    expect(page.locator("#sf-problems")).to_contain_text("10000 errors", timeout=30_000)
    assert page.locator("#sf-problems li").count() == 100


def test_ctrl_c_ends_the_page_before_it_waits(monkeypatch):
    addresses = []

    def interrupted(line, **_):
        addresses.append(line.split()[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "print", interrupted)
    assert __main__.main(["plan", "--ui"]) == 0
    port = int(addresses[0].rstrip("/").rpartition(":")[2])
    with socket.socket() as one:
        assert one.connect_ex(("127.0.0.1", port)) != 0


def test_ctrl_c_is_not_lost_in_a_destructor():
    class Interrupted:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    page = ui.serve(told=lambda address: [Interrupted()].clear())
    assert not page.is_running
    assert signal.getsignal(signal.SIGINT) is before


def test_a_page_that_a_thread_serves_ends_when_it_is_closed(monkeypatch):
    pages, launch = [], gradio.Blocks.launch
    monkeypatch.setattr(
        gradio.Blocks, "launch", lambda page, **more: pages.append(page) or launch(page, **more)
    )
    thread = threading.Thread(target=ui.serve, kwargs={"told": lambda address: pages[0].close()})
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


@SLOW
def test_ctrl_c_ends_the_page_without_a_traceback():
    command = [sys.executable, "-m", "sfcore", "plan", "--ui"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().endswith("/ until Ctrl-C\n")
    process.send_signal(signal.SIGINT)
    # 7 s alone; more than 60 beside a second suite on two cores.
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    assert "Traceback" not in out + error


@SLOW
def test_the_page_listens_at_this_machine_alone(served):
    port = int(served.rstrip("/").rpartition(":")[2])
    host = socket.gethostbyname(socket.gethostname())
    for address in {host, "127.0.0.2"} - {"127.0.0.1"}:
        with socket.socket() as one:
            one.settimeout(2)
            assert one.connect_ex((address, port)) != 0, address


@SLOW
def test_the_example_works_in_a_browser(opened):
    with server("-c", example_code() + LAUNCH) as address:
        follow_the_example(opened(address))


def follow_the_example(page):
    warmup = page.locator("#warmup input[type=number]")

    def pick(value):
        page.locator("#scheduler input").click()
        page.get_by_role("option", name=value, exact=True).click()

    expect(warmup).to_have_value("10")
    pick("constant")
    expect(warmup).to_be_disabled()
    expect(page.locator("#warmup .info-text")).to_have_text("constant has no warm-up.")
    pick("cosine")
    expect(warmup).to_be_enabled()
    expect(warmup).to_have_value("10")
    page.locator("#load").click()  # a preset with constant and 20
    expect(warmup).to_be_disabled()
    pick("cosine")
    expect(warmup).to_have_value("20")


def presets():
    return [path for path in sorted(KOHYA_SS.glob("**/*.json")) if {"presets", "test"} & {*path.parts}]


NEEDS_KOHYA = pytest.mark.skipif(
    not KOHYA_SS.is_dir(), reason="set KOHYA_SS to a checkout of github.com/bmaltais/kohya_ss"
)


@SLOW
@NEEDS_KOHYA
def test_every_preset_of_kohya_ss_is_opened(planned):
    page, found = planned(), presets()
    assert len(found) > 20
    for path in found:
        plan = check(json.loads(path.read_text("utf-8")))
        open_file(page, path)
        link = page.locator("#sf-files a")
        expect(link).to_have_attribute("download", f"{path.stem}-checked.json")
        codes = page.locator("#sf-problems .code").all_inner_texts()
        assert codes == [one.code for one in (*plan.errors, *plan.warnings)], path
        expect(field(page, "optimizer")).to_have_value(plan.optimizer)


KOHYAS_OWN = """
import sys
import gradio
from sfcore.plan.ui import follow
sys.path.insert(0, sys.argv[1])
from kohya_gui.class_basic_training import BasicTraining
with gradio.Blocks() as app:
    theirs = BasicTraining(gradio.Checkbox(visible=False), lr_scheduler_value="cosine", lr_warmup_value=10)
    names = "optimizer lr_scheduler lr_warmup lr_warmup_steps lr_scheduler_num_cycles lr_scheduler_power"
    followed = follow({name: getattr(theirs, name) for name in names.split()}, source="kohya")
    for choice in (theirs.optimizer, theirs.lr_scheduler):
        choice.change(*followed.change)
"""


@SLOW
@NEEDS_KOHYA
def test_kohya_ss_own_components_are_followed(opened, tmp_path):
    # Where it starts it writes a log.
    with server("-c", KOHYAS_OWN + LAUNCH, str(KOHYA_SS.resolve()), folder=tmp_path) as address:
        follow_kohyas(opened(address))


def follow_kohyas(page):
    def pick(label, value):
        page.get_by_label(label, exact=True).click()
        page.get_by_role("option", name=value, exact=True).click()

    warmup = page.get_by_label("number input for LR warmup (% of total steps)")
    expect(warmup).to_have_value("10")
    for label, off, on in (
        ("Optimizer", "AdamWScheduleFree", "AdamW8bit"),
        ("LR Scheduler", "constant", "linear"),
        ("Optimizer", "RAdamScheduleFree", "Prodigy"),
    ):
        pick(label, off)
        expect(warmup).to_be_disabled()
        expect(warmup).to_have_value("0")
        pick(label, on)
        expect(warmup).to_be_enabled()
        expect(warmup).to_have_value("10")
