"""The page at / in Chromium, against the bundled model.

CHROMIUM names the browser (default: chromium of the path). With SCREENSHOTS, a folder, the server is kept busy for five minutes
and pictures of the page are written there; without it they are taken after seconds, and thrown away.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import time
import urllib.request

import pytest
from playwright.sync_api import expect, sync_playwright

from conftest import ADMIN_KEY, CALCULATOR, KEY, PRODUCT, SUM, serving

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]
WIDE, NARROW = {"width": 1200, "height": 750}, {"width": 360, "height": 640}
QUESTION = SUM[0]["content"]
ANSWER = "347 + 286 = 633."

expect.set_options(timeout=20_000)


@pytest.fixture(scope="session")
def chromium():
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path, "no Chromium: install it, or name it in CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a page of its own, with keys in its tab. What its console says must match one of `forgiven`."""
    with contextlib.ExitStack() as stack:
        said, forgiven = [], []

        def opened(base, keys=(KEY, ADMIN_KEY), forgive=(), **options):
            options = {"viewport": WIDE, "reduced_motion": "reduce", **options}
            context = stack.enter_context(contextlib.closing(chromium.new_context(**options)))
            forgiven.extend(forgive)
            page = context.new_page()
            page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: said.append(f"exception: {error}"))
            if keys:
                # Once: what the page does with its keys from then on is its own business.
                kept = json.dumps(dict(zip(("api-key", "admin-key"), keys)))
                page.add_init_script(f"if (!('api-key' in sessionStorage)) Object.assign(sessionStorage, {kept})")
            page.goto(f"{base}/")
            return page

        yield opened
        unforgiven = [text for text in said if not any(re.search(pattern, text) for pattern in forgiven)]
        assert not unforgiven, unforgiven


@pytest.fixture(scope="session")
def slow():
    """A server that is so slow that a long reply is never over before somebody looks."""
    with serving("--device", "reference") as url:
        yield url


REFUSED_KEY = r"Failed to load resource: the server responded with a status of 40[13]"
REFUSED_REQUEST = r"Failed to load resource: the server responded with a status of 400"


def ask(page, text=QUESTION):
    page.locator("#prompt").fill(text)
    page.keyboard.press("Enter")
    return page.locator(".reply").last


def complete(reply):
    expect(reply).to_have_attribute("data-end", "complete")
    return reply.locator(":scope > .text").text_content()


def metric(base, name, *labels):
    """The series of this name and these labels, together."""
    lines = urllib.request.urlopen(f"{base}/metrics").read().decode().splitlines()
    of_name = [line for line in lines if line.split("{")[0] == name]
    return sum(float(line.rsplit(" ", 1)[1]) for line in of_name if all(label in line for label in labels))


def eventually(holds, what):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.05)


def without_end(page):
    """Replies go on for as long as the context allows."""

    def longer(route):
        body = {**route.request.post_data_json, "ignore_eos": True, "max_tokens": 900}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", longer)


def test_it_loads_from_this_server_alone_and_shows_models_and_generations(url, visit):
    page = visit(url, keys=None, forgive=[REFUSED_KEY])
    page.evaluate(f"sessionStorage.setItem('api-key', '{KEY}'); sessionStorage.setItem('admin-key', '{ADMIN_KEY}')")
    # What the page still asks without keys ends with it, and with that what the console would say of it.
    page.goto("about:blank")
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(url)
    expect(page.locator("#health")).to_have_text("ready")
    expect(page.locator("#model option")).to_have_text(["abacus", "tuned (adapter)"])
    expect(page.locator("#model-list")).to_contain_text("adapter of abacus, context of 1,024 tokens")
    card = page.locator("#generations .card")
    expect(card).to_contain_text("serving")
    expect(card).to_contain_text("Hand-off passed")
    expect(card).to_contain_text("nats at most")
    page.locator("#handoff summary").click()
    expect(page.locator("#handoff-report")).to_contain_text("numerics")
    expect(page.locator("#handoff-report")).to_contain_text("pass")
    assert page.locator("#version").text_content() in page.request.get(f"{url}/version").text()
    assert asked and all(address.startswith(f"{url}/") for address in asked), asked
    assert said == [], "with good keys the console is silent"


def test_without_keys_a_server_that_asks_for_none_is_used_and_the_console_is_silent(slow, visit):
    page = visit(slow, keys=None)
    assert complete(ask(page)) == ANSWER
    card = page.locator("#generations .card")
    expect(card).to_contain_text("Hand-off passed")
    expect(page.locator("#admin-error")).to_contain_text("an admin key is needed")


def test_a_reply_comes_with_its_reasoning_folded_and_its_figures(url, visit):
    page = visit(url)
    reply = ask(page)
    assert complete(reply) == ANSWER
    reasoning = reply.locator("details.reasoning")
    assert reasoning.get_attribute("open") is None
    assert "633" in reasoning.locator(".text").text_content()
    assert re.match(r"Reasoning, \d+ tokens", reasoning.locator("summary").text_content())
    figures = reply.locator(".figures").text_content()
    form = r"stop · \d+ tokens · first after [\d.,]+ ms · [\d.,]+ tokens/s · generation [0-9a-f]{12}"
    assert re.fullmatch(form, figures), figures
    page.locator("#model").select_option("tuned")
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    page.locator("#settings-toggle").click()
    page.locator("#system").fill("Be brief.")
    page.locator("#temperature").fill("0.5")
    page.locator("#max-tokens").fill("5")
    reply = ask(page, "again")
    complete(reply)
    expect(reply.locator(".figures")).to_contain_text("length · 5 tokens")
    expect(reply.locator("h3")).to_have_text("tuned")
    (body,) = asked
    assert (body["model"], body["temperature"], body["max_tokens"], body["stream"]) == ("tuned", 0.5, 5, True)
    said = [(message["role"], message["content"]) for message in body["messages"]]
    assert said == [("system", "Be brief."), ("user", QUESTION), ("assistant", ANSWER), ("user", "again")]


def test_a_reply_is_shown_while_it_comes_and_stopping_it_frees_the_server(slow, visit):
    page = visit(slow, keys=None)
    without_end(page)
    aborted = lambda: metric(slow, "vllm:request_success_total", '"abort"')
    before = aborted()
    for stop in (lambda: page.keyboard.press("Escape"), page.locator("#stop").click):
        reply = ask(page, "hm")
        shown = lambda: len(reply.text_content())
        # What the model has drawn begins with its reasoning, or with its answer.
        eventually(lambda: "".join(reply.locator(".text").all_text_contents()), "text")
        length = shown()
        eventually(lambda: shown() > length, "more text")
        assert reply.get_attribute("aria-busy") == "true"
        eventually(lambda: metric(slow, "vllm:num_requests_running") == 1, "a running request")
        stop()
        expect(reply).to_have_attribute("data-end", "stopped")
        expect(reply.locator(".figures")).to_contain_text("stopped · ")
        expect(page.locator("#send")).to_be_visible()
    eventually(lambda: aborted() == before + 2, "aborted requests")
    eventually(lambda: metric(slow, "vllm:num_requests_running") == 0, "no running request")
    eventually(lambda: metric(slow, "baton_kv_blocks", '"used"') == 0, "free blocks")
    page.unroute_all()
    page.locator("#new-chat").click()
    assert complete(ask(page)) == ANSWER, "the next one is answered"


def test_a_refusal_of_a_key_is_shown_as_what_it_is_and_a_right_key_helps(url, visit):
    page = visit(url, keys=("wrong", ""), forgive=[REFUSED_KEY])
    expect(page.locator("#models-error")).to_contain_text("401: a valid API key is needed")
    expect(page.locator("#admin-error")).to_contain_text("401: an admin key (--admin-api-key")
    reply = ask(page)
    expect(reply.locator('[role="alert"]')).to_contain_text("401: a valid API key is needed")
    expect(reply.locator('[role="alert"]')).to_contain_text("invalid_api_key")
    expect(page.locator("#prompt")).to_have_value(QUESTION)
    page.locator("#keys summary").click()
    page.locator("#key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_have_value("abacus")
    expect(page.locator("#models-error")).to_be_hidden()
    expect(page.locator("#admin-error")).to_contain_text("403: this API key is not for this route")
    expect(page.locator("#generations .card")).to_contain_text("Hand-off passed")
    page.keyboard.press("Enter")
    assert complete(page.locator(".reply").last) == ANSWER
    assert KEY not in json.dumps(page.evaluate("[{...localStorage}, document.cookie, location.href]"))
    assert page.evaluate("sessionStorage.getItem('api-key')") == KEY


def test_a_request_that_is_refused_says_why_and_names_the_parameter(url, visit):
    page = visit(url, forgive=[REFUSED_REQUEST])
    page.locator("#settings-toggle").click()
    page.locator("#tools").fill("[{]")
    page.locator("#prompt").fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.locator("#tools-error")).to_contain_text("The tools are no JSON")
    expect(page.locator(".turn")).to_have_count(0)
    page.locator("#tools").fill('[{"type": "nothing"}]')
    alert = ask(page).locator('[role="alert"]')
    expect(alert).to_contain_text("400: tools[0].type")
    expect(alert).to_contain_text("parameter tools[0].type")
    page.locator("#tools").fill("")
    assert complete(ask(page)) == ANSWER


def test_calls_of_tools_are_shown_and_their_results_go_back(url, visit):
    page = visit(url)
    page.locator("#settings-toggle").click()
    page.locator("#tools").fill(json.dumps([CALCULATOR]))
    reply = ask(page, PRODUCT[0]["content"])
    complete(reply)
    call = reply.locator(".call")
    expect(call.locator("h4")).to_have_text("calls calculator")
    assert json.loads(call.locator("pre").text_content()) == {"expression": "57258*6278"}
    expect(reply.locator(".figures")).to_contain_text("tool_calls · ")
    reply.get_by_label("Result of calculator").fill("359465724")
    page.keyboard.press("Enter")
    expect(page.locator(".reply")).to_have_count(2)
    assert "359465724" in complete(page.locator(".reply").last)


def test_what_a_model_writes_is_text_and_a_stream_that_fails_says_so(url, visit):
    page = visit(url)
    evil = '<img src="/x" onerror="alert(1)"><script>alert(2)</script>'
    delta = lambda delta: "data: " + json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) + "\n\n"
    written = delta({"reasoning_content": evil}) + delta({"content": evil})
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": evil, "arguments": evil}}
    written += ": a comment\n\n" + delta({"tool_calls": [call]})
    failure = {"error": {"message": "the device failed", "type": "server_error", "param": None, "code": "engine_error"}}
    ends = {f"data: {json.dumps(failure)}\n\n": "the device failed (engine_error)"}
    ends |= {"": "the reply broke off", "data: {\n\n": "the reply broke off"}
    for end, words in ends.items():
        answer = lambda route: route.fulfill(status=200, content_type="text/event-stream", body=written + end)
        page.route("**/v1/chat/completions", answer)
        reply = ask(page, evil)
        expect(reply.locator('[role="alert"]')).to_contain_text(words)
        expect(reply).to_have_attribute("data-end", "failed")
        assert reply.locator(":scope > .text").text_content() == evil
        assert reply.locator("details .text").text_content() == evil
        assert reply.locator(".call pre").text_content() == evil
        page.unroute_all()
    assert page.locator("#log img, #log script").count() == 0


def test_charts_move_with_the_load_and_say_what_they_show(url, visit):
    page = visit(url)
    generated = page.locator('#chart-tokens [data-line="0"] output')
    expect(generated).to_have_text("0")
    with busy(url):
        for chart, value in (
            ("requests", r"[1-9]"), ("tokens", r"[1-9]"), ("cache", r"[1-9]\S* %|0\.[1-9] %"), ("batch", r"[1-9]"),
            ("first", r"[1-9][\d.]* m?s"), ("between", r"[1-9][\d.]* m?s|0\.\d ms"),
        ):
            shown = page.locator(f"#chart-{chart}")
            expect(shown.locator('[data-line="0"] output')).to_have_text(re.compile(value))
            expect(shown.locator("svg")).to_have_attribute("aria-label", re.compile(f"over the last 5 minutes; now .*{value}"))
            expect(shown.locator("svg path.stroke").first).to_be_attached()
        # A line that moves has more than one height.
        path = page.locator("#chart-tokens .stroke").first
        eventually(lambda: len(set(re.findall(r",([\d.]+)", path.get_attribute("d") or ""))) > 1, "a line that moves")
    expect(page.locator('#chart-requests [data-line="0"] output')).to_have_text("0")


@contextlib.contextmanager
def busy(base, clients=6):
    """Clients that chat without a pause."""
    end = threading.Event()

    def chat(number):
        while not end.is_set():
            body = {"messages": [{"role": "user", "content": f"What is {number} + 1?"}], "ignore_eos": True, "max_tokens": 400}
            key = {"authorization": f"Bearer {KEY}"}
            request = urllib.request.Request(f"{base}/v1/chat/completions", json.dumps(body).encode(), key)
            urllib.request.urlopen(request).read()

    threads = [threading.Thread(target=chat, args=(number,)) for number in range(clients)]
    [thread.start() for thread in threads]
    try:
        yield
    finally:
        end.set()
        [thread.join() for thread in threads]


def test_nothing_is_asked_while_nobody_looks(url, visit):
    page = visit(url)
    page.clock.install()
    page.reload()
    expect(page.locator("#health")).to_have_text("ready")
    look = """hidden => {
      Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
      document.dispatchEvent(new Event('visibilitychange'));
    }"""
    page.evaluate(look, True)
    page.wait_for_load_state("networkidle")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.run_for(60_000)
    assert asked == []
    with page.expect_request("**/metrics"):
        page.evaluate(look, False)
        page.clock.run_for(1)


def test_a_server_that_is_gone_is_said_to_be(visit):
    with serving() as base:
        page = visit(base, keys=None, forgive=["ERR_CONNECTION", "net::ERR_"])
        expect(page.locator("#health")).to_have_text("ready")
    expect(page.locator("#health")).to_have_text("the server cannot be reached")
    reply = ask(page)
    expect(reply.locator('[role="alert"]')).to_contain_text("the server cannot be reached")


def test_at_360_by_640_nothing_is_cut_off_or_scrolls_sideways(url, visit):
    page = visit(url, viewport=NARROW)
    complete(ask(page, "x" * 300))
    fits = "document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight"
    for view, shown in (("chat", "#prompt"), ("load", "#chart-requests"), ("models", "#generations .card")):
        page.locator(f'nav [data-view="{view}"]').click()
        expect(page.locator(shown)).to_be_in_viewport()
        expect(page.locator("main .side, main .chat").filter(visible=True)).to_have_count(1)
        assert page.evaluate(fits), view
        wide = """[...document.querySelectorAll('main *')]
          .filter(e => e.checkVisibility() && !e.closest('svg, .unseen') && e.getBoundingClientRect().right > innerWidth + 1)
          .map(e => e.outerHTML)"""
        assert page.evaluate(wide) == [], view
    page.locator("#keys summary").click()
    expect(page.locator("#keys-form button")).to_be_in_viewport(ratio=1)
    assert page.evaluate(fits)


def test_everything_can_be_done_with_the_keyboard_and_what_has_the_focus_is_seen(url, visit):
    page = visit(url, keys=None, forgive=[REFUSED_KEY])
    key = page.keyboard
    outlined = "getComputedStyle(document.activeElement).outlineStyle !== 'none'"

    def tab_to(target):
        for _ in range(40):
            key.press("Tab")
            assert page.evaluate(outlined), page.evaluate("document.activeElement.outerHTML")
            if page.evaluate("target => document.activeElement.matches(target)", target):
                return
        raise AssertionError(f"{target} cannot be reached")

    key.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    tab_to("#keys summary")
    key.press("Enter")
    tab_to("#key")
    key.press("Escape")
    expect(page.locator("#keys summary")).to_be_focused()
    expect(page.locator("#key")).to_be_hidden()
    key.press("Enter")
    tab_to("#key")
    key.type(KEY)
    key.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#model")).to_be_enabled()
    key.type("What is")
    key.press("Shift+Enter")
    key.type("347 + 286?")
    expect(page.locator("#prompt")).to_have_value("What is\n347 + 286?")
    key.press("Enter")
    complete(page.locator(".reply").last)
    key.press("Shift+Tab")
    key.press("/")
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#prompt")).to_have_value("")
    page.locator(".skip").focus()
    for target in ("#theme", "#model", "#settings-toggle", "#new-chat", "#log", ".reasoning summary", "#prompt", "#send"):
        tab_to(target)
    page.locator("#new-chat").focus()
    key.press("Enter")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#prompt")).to_be_focused()


CONTRAST = """() => {
  const parse = color => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return {rgb: [r, g, b], a}; };
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const {rgb, a} = parse(getComputedStyle(at).backgroundColor);
      if (a === 1) return rgb;
    }
    throw new Error("no ground");
  };
  const light = rgb => rgb.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const texts = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.disabled
    && [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim()));
  return texts.map(e => {
    const pair = [light(parse(getComputedStyle(e).color).rgb), light(ground(e))].sort((a, b) => b - a);
    return [(pair[0] + 0.05) / (pair[1] + 0.05), e.outerHTML.slice(0, 200)];
  }).filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_in_both_themes_and_the_choice_lasts(url, visit, theme):
    other = {"light": "dark", "dark": "light"}[theme]
    page = visit(url, color_scheme=theme)
    scheme = lambda: page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    complete(ask(page))
    expect(page.locator("#generations .card")).to_contain_text("passed")
    page.locator("#settings-toggle").click()
    own = scheme()
    assert page.evaluate(CONTRAST) == []
    button = page.locator("#theme")
    for choice in ("light", "dark"):
        button.click()
        expect(button).to_have_text(f"Theme: {choice}")
        if choice == other:
            break
    assert scheme() != own
    page.reload()
    expect(button).to_have_text(f"Theme: {other}")
    assert scheme() != own


def test_pictures_of_the_page(url, visit, tmp_path):
    folder = os.environ.get("SCREENSHOTS")
    shot = lambda page, name: page.screenshot(path=f"{folder or tmp_path}/{name}.png")
    pages = {name: visit(url, color_scheme=scheme, viewport=size) for name, scheme, size in
             (("light", "light", WIDE), ("dark", "dark", WIDE), ("narrow", "dark", NARROW))}
    with busy(url, 3):
        if folder:
            end = time.monotonic() + 310
            while time.monotonic() < end:
                with busy(url, 12):
                    pages["light"].wait_for_timeout(15_000)
                pages["light"].wait_for_timeout(25_000)
        for name, page in pages.items():
            complete(ask(page))
            page.locator(".reasoning summary").last.click()
            if name == "dark":
                page.locator("#settings-toggle").click()
                page.locator("#tools").fill(json.dumps([CALCULATOR]))
                complete(ask(page, PRODUCT[0]["content"]))
                page.locator("#settings-toggle").click()
            expect(page.locator("#generations .card")).to_contain_text("passed")
            shot(page, name)
        pages["narrow"].locator('nav [data-view="load"]').click()
        shot(pages["narrow"], "narrow-load")
