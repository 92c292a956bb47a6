"""The page in a headless browser. `server` is the address of a server with an index of at least three documents, of
which one is longer than a snippet and one has a second id. What a server says only at times, `answer` says for it."""

import json
import os
import shutil
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import DOCUMENTS, PROMPTS

REMEDY = "pip install playwright, and apt-get install chromium, to test the page"
playwright = pytest.importorskip("playwright.sync_api", reason=REMEDY)
expect = playwright.expect

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLORS = {"light": "rgb(248, 249, 247)", "dark": "rgb(17, 21, 19)"}


@dataclass
class Watch:
    """What a page must not do."""

    refusals_expected: bool = False
    problems: list[str] = field(default_factory=list)

    def console(self, message):
        refused = message.text.startswith("Failed to load resource: the server responded")
        if message.type in ("error", "warning") and not (refused and self.refusals_expected):
            self.problems.append(message.text)

    def error(self, error):
        self.problems.append(str(error))

    def foreign(self, request, host):
        if urlsplit(request.url).netloc != host:
            self.problems.append(f"asked another host: {request.url}")


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"there is none of {', '.join(BROWSERS)}: {REMEDY}")
    # Chromium's sandbox refuses root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def watch():
    return Watch()


@pytest.fixture
def page(browser, server, watch):
    context = browser.new_context(base_url=server)
    page = context.new_page()
    host = urlsplit(server).netloc
    page.on("console", watch.console)
    page.on("pageerror", watch.error)
    page.on("request", lambda request: watch.foreign(request, host))
    yield page
    context.close()
    assert watch.problems == []


def open_page(page, area="search"):
    response = page.goto(f"/#{area}")
    expect(page.locator(f"#{area}-area")).to_be_visible()
    return response


def search(page, k):
    page.locator("#results-count").fill(str(k))
    page.locator("#query").fill("a question")
    page.locator("#query").press("Enter")
    expect(page.locator("#search-status")).not_to_contain_text("Searching")


def ask(page, text="a question"):
    page.locator("#message").fill(text)
    page.locator("#message").press("Enter")


def answer(page, path, *, status=200, body=None, events=None, end=""):
    """Answers requests of a path in the server's place, with JSON or with server-sent events."""
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events or ()) + end
    kind, text = ("text/event-stream", stream) if events else ("application/json", json.dumps(body))
    page.route(f"**{path}", lambda route: route.fulfill(status=status, content_type=kind, body=text))


def error(message, kind="invalid_request_error", code=None):
    return {"error": {"message": message, "type": kind, "code": code}}


def piece(text, **more):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}


def document(**changes):
    return {"rank": 1, "score": 0.5, "id": "d1", "title": "", "text": "a text", "same_text": []} | changes


def test_the_page_is_served_with_a_policy_that_allows_nothing_from_other_hosts(page):
    assert "default-src 'self'" in open_page(page).headers["content-security-policy"]
    expect(page.locator("#corpus")).to_contain_text("documents")


def test_a_search_shows_documents_in_the_order_of_their_scores(page):
    open_page(page)
    search(page, k=3)
    results = page.locator("#results .document")
    expect(results).to_have_count(3)
    assert page.locator("#results [data-part=rank]").all_inner_texts() == ["1", "2", "3"]
    scores = [float(score) for score in page.locator("#results [data-part=score]").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    expect(page.locator("#search-status")).to_contain_text("3 documents")
    expect(page.locator("#search-status")).to_contain_text("token")


def test_a_search_sends_query_instruction_and_number(page):
    open_page(page)
    page.locator("#instruction").fill("Find the evidence")
    with page.expect_request("**/v1/search") as request:
        search(page, k=2)
    assert request.value.post_data_json == {"query": "a question", "instruction": "Find the evidence", "k": 2}


def test_a_result_expands_to_the_whole_text_and_folds_again(page):
    text = f"{'A long line. ' * 40}\n\nThe end."
    answer(page, "/v1/search", body={"data": [document(text=text)], "usage": {"prompt_tokens": 1}})
    open_page(page)
    search(page, k=1)
    shown, more = page.locator("#results [data-part=text]"), page.locator("#results [data-part=more]")
    folded = shown.text_content()
    assert len(folded) <= 261 and folded.endswith("…")
    more.press("Enter")
    assert shown.text_content() == text
    expect(more).to_have_attribute("aria-expanded", "true")
    more.press("Enter")
    assert shown.text_content() == folded


def test_documents_of_the_store_expand_and_name_the_ids_that_share_their_text(page):
    open_page(page)
    search(page, k=3)
    more = page.locator("#results [data-part=more]:visible").first
    more.click()
    expect(page.locator("#results [data-part=more][aria-expanded=true]")).to_have_text("Show less")
    expect(page.locator("#results")).to_contain_text("same text:")


def test_a_first_instruction_and_query_are_offered(page):
    open_page(page)
    with page.expect_request("**/v1/search") as request:
        page.locator("#try-search").click()
    asked = request.value.post_data_json
    assert (asked["query"], asked["instruction"]) == (DOCUMENTS[0]["title"], PROMPTS["question"])
    expect(page.locator("#results .document")).to_have_count(3)
    page.get_by_role("link", name="Chat").click()
    page.locator("#try-chat").click()
    expect(page.locator(".question")).to_contain_text("What is a text embedding")
    expect(page.locator(".turn > .facts")).to_contain_text("total", timeout=120_000)


def test_while_programs_are_compiled_the_page_says_so_and_what_is_asked_waits(page):
    warm, sent = [], []
    page.on("request", lambda request: sent.append(urlsplit(request.url).path))
    told = {"status": "ok", "ready": False, "programs_compiled": 12}
    page.route("**/health", lambda route: route.continue_() if warm else route.fulfill(json=told))
    open_page(page)
    expect(page.get_by_role("status").filter(has_text="getting ready")).to_contain_text("12 programs compiled so far")
    page.locator("#query").fill("a question")
    page.locator("#query").press("Enter")
    expect(page.locator("#search-status")).to_have_text("Searching…")
    with page.expect_request("**/health"):
        pass
    assert "/v1/search" not in sent
    warm.append(True)
    expect(page.locator("#results .document")).to_have_count(3)
    expect(page.locator("#getting-ready")).to_be_hidden()


def test_what_waits_for_programs_can_be_stopped(page):
    page.route("**/health", lambda route: route.fulfill(json={"ready": False, "programs_compiled": 1}))
    open_page(page)
    page.locator("#query").fill("a question")
    page.locator("#query").press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator("#search-status")).to_have_text("Stopped.")


def test_a_model_that_fails_while_it_gets_ready_is_told(page, watch):
    watch.refusals_expected = True
    answer(page, "/health", status=503, body=error("the model has failed", "server_error", "model_failed"))
    page.goto("/")
    expect(page.get_by_role("alert")).to_contain_text("the model has failed")


def test_texts_with_markup_are_shown_as_text(page):
    text = "<img src=x onerror=alert(1)><script>alert(1)</script><b>bold</b>"
    found = document(id=text, title=text, text=text, same_text=[text])
    answer(page, "/v1/search", body={"data": [found], "usage": {"prompt_tokens": 1}})
    answer(page, "/v1/chat/completions", events=[piece(text, documents=[found]), error(text)])
    open_page(page)
    search(page, k=1)
    page.get_by_role("link", name="Chat").click()
    ask(page, text)
    expect(page.locator(".notice")).to_contain_text(text)
    assert page.locator(".answer").text_content() == page.locator(".question").text_content() == text
    for part in ("title", "text"):
        assert page.locator(f"[data-part={part}]").all_text_contents() == [text, text]
    assert page.locator("main :is(img, script, b)").count() == 0


def test_an_error_of_a_search_is_readable_and_can_be_tried_again(page, watch):
    watch.refusals_expected = True
    answer(page, "/v1/search", status=400, body=error("k=3 is more than this test allows", code="invalid_value"))
    open_page(page)
    search(page, k=3)
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("k=3 is more than this test allows")
    expect(notice).to_contain_text("invalid_request_error · invalid_value")
    page.unroute("**/v1/search")
    notice.get_by_role("button", name="Try again").click()
    expect(page.locator("#results .document")).to_have_count(3)
    expect(page.get_by_role("alert")).to_have_count(0)


def test_an_answer_that_is_not_of_the_api_names_its_status(page, watch):
    watch.refusals_expected = True
    page.route("**/v1/search", lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    open_page(page)
    search(page, k=3)
    expect(page.get_by_role("alert")).to_contain_text("The server answered 502")


def test_without_an_index_the_page_says_how_to_make_one_and_chats_without_documents(page):
    model = {"id": "m", "max_length": 256, "embed_dim": 32, "index": None}
    answer(page, "/v1/models", body={"data": [model]})
    open_page(page)
    expect(page.locator("#no-index")).to_contain_text("grit-jax index MODEL CORPUS STORE")
    expect(page.locator("#search-form")).to_be_hidden()
    page.get_by_role("link", name="Chat").click()
    expect(page.locator("#message")).to_be_visible()
    expect(page.locator("#use-documents")).to_be_hidden()


def test_a_chat_streams_an_answer_and_says_what_it_took(page):
    open_page(page, "chat")
    ask(page)
    expect(page.locator(".turn > .facts")).to_contain_text("in ·", timeout=120_000)
    expect(page.locator(".turn > .facts")).to_contain_text("total")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_tokens_cached_and_cut_answers_are_told(page):
    usage = {"prompt_tokens": 1200, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1100}}
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    events = [piece("Ja, "), piece("ä…"), end, {"choices": [], "usage": usage}]
    answer(page, "/v1/chat/completions", events=events, end="data: [DONE]\n\n")
    open_page(page, "chat")
    ask(page)
    facts = page.locator(".turn > .facts")
    expect(facts).to_contain_text("cut at max tokens · 1,200 tokens in, 1,100 cached · 2 out · first token")
    expect(page.locator(".answer")).to_have_text("Ja, ä…")


def test_a_conversation_is_sent_in_alternating_turns_without_those_that_failed(page):
    open_page(page, "chat")
    answer(page, "/v1/chat/completions", events=[error("the device is busy")])
    ask(page, "one that fails")
    expect(page.get_by_role("alert")).to_contain_text("the device is busy")
    page.unroute("**/v1/chat/completions")
    done = page.locator(".turn > .facts:not(:empty)")
    ask(page, "first")
    expect(done).to_have_count(1, timeout=120_000)
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "second")
    body = request.value.post_data_json
    said = [(message["role"], message["content"]) for message in body["messages"]]
    first = page.locator(".answer").nth(1).text_content()
    assert said == [("user", "first"), ("assistant", first), ("user", "second")]
    assert body["stream"] and body["stream_options"] == {"include_usage": True} and "retrieval" not in body
    expect(done).to_have_count(2, timeout=120_000)


def test_settings_are_sent(page):
    open_page(page, "chat")
    page.get_by_text("Settings").click()
    for name, value in {"temperature": "0.7", "max-tokens": "5", "seed": "3"}.items():
        page.locator(f"#{name}").fill(value)
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page)
    sent = request.value.post_data_json
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0.7, 5, 3)


def test_a_wrong_setting_that_is_folded_away_is_unfolded_and_nothing_is_sent(page):
    open_page(page, "chat")
    page.get_by_text("Settings").click()
    page.locator("#temperature").fill("-1")
    page.get_by_text("Settings").click()
    ask(page)
    expect(page.locator("#temperature")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(0)


def test_an_answer_from_documents_sends_one_turn_and_shows_what_was_used(page):
    open_page(page, "chat")
    done = page.locator(".turn > .facts:not(:empty)")
    ask(page, "before")
    expect(done).to_have_count(1, timeout=120_000)
    page.get_by_role("switch", name="Answer from documents").check()
    page.get_by_label("Method").select_option(label="Cached document")
    expect(page.locator("#method-note")).to_contain_text("reused")
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "which?")
    sent = request.value.post_data_json
    assert sent["messages"] == [{"role": "user", "content": "which?"}]
    assert sent["retrieval"] == {"method": "document_cache", "k": 1, "instruction": ""}
    expect(done).to_have_count(2, timeout=120_000)
    expect(page.locator(".sources summary:visible")).to_have_text("1 document used")
    expect(page.locator(".sources .document")).to_have_count(1)
    expect(done.last).to_contain_text("tokens in")


def test_an_error_in_the_middle_of_an_answer_keeps_what_was_written(page):
    answer(page, "/v1/chat/completions", events=[piece("half an "), error("out of memory", "server_error")])
    open_page(page, "chat")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("out of memory")
    expect(page.locator(".answer")).to_have_text("half an")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.locator(".turn > .facts")).to_contain_text("total", timeout=120_000)


def test_a_stream_that_ends_early_is_told(page):
    answer(page, "/v1/chat/completions", events=[piece("half an ")])
    open_page(page, "chat")
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("The answer broke off")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping_aborts_a_request_that_has_not_begun_to_answer(page, way):
    page.route("**/v1/chat/completions", lambda route: None)
    open_page(page, "chat")
    ask(page)
    with page.expect_event("requestfailed") as failed:
        page.get_by_role("button", name="Stop").click() if way == "button" else page.keyboard.press("Escape")
    assert failed.value.url.endswith("/v1/chat/completions")
    expect(page.locator(".turn > .facts")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_stopping_in_the_middle_of_an_answer_keeps_what_was_written(page):
    open_page(page, "chat")
    # Small models are done before a test could click, so the page itself clicks as soon as there is an answer.
    page.evaluate("""() => new MutationObserver((changes, observer) => {
        if (!document.querySelector(".answer")?.textContent) return;
        observer.disconnect();
        document.getElementById("stop").click();
    }).observe(document.getElementById("conversation"), {childList: true, subtree: true, characterData: true})""")
    with page.expect_event("requestfailed", timeout=120_000):
        ask(page, "a slow one")
    expect(page.locator(".turn > .facts")).to_contain_text("stopped")
    expect(page.locator(".answer")).not_to_be_empty()


def test_enter_sends_and_shift_enter_begins_a_line(page):
    page.route("**/v1/chat/completions", lambda route: None)
    open_page(page, "chat")
    message = page.locator("#message")
    message.press_sequentially("one")
    message.press("Shift+Enter")
    message.press_sequentially("two")
    assert message.input_value() == "one\ntwo"
    message.press("Enter")
    assert page.locator(".question").text_content() == "one\ntwo"
    assert message.input_value() == ""


def test_clearing_stops_the_answer_and_forgets_the_conversation(page):
    page.route("**/v1/chat/completions", lambda route: None)
    open_page(page, "chat")
    ask(page)
    with page.expect_event("requestfailed"):
        page.get_by_role("button", name="Clear").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def guard(page, key):
    """Lets requests with a key through to the server, which asks for none."""

    def check(route):
        if route.request.headers.get("authorization") == f"Bearer {key}":
            route.continue_()
        else:
            body = json.dumps(error("a key is needed", "authentication_error"))
            route.fulfill(status=401, content_type="application/json", body=body)

    page.route("**/v1/**", check)


def test_a_key_is_asked_for_when_the_server_wants_one_and_kept_for_the_tab(page, watch):
    watch.refusals_expected = True
    guard(page, "secret")
    page.goto("/")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("a key is needed")
    for key in ("wrong", "secret"):
        page.get_by_label("API key").fill(key)
        page.get_by_label("API key").press("Enter")
    expect(dialog).to_be_hidden()
    search(page, k=3)
    expect(page.locator("#results .document")).to_have_count(3)
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    expect(page.locator("#query")).to_be_visible()
    expect(dialog).to_be_hidden()


def test_without_the_key_the_page_says_why_it_is_empty(page, watch):
    watch.refusals_expected = True
    guard(page, "secret")
    page.goto("/")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("alert")).to_contain_text("a key is needed")


def test_no_key_is_asked_for_where_the_server_wants_none(page):
    open_page(page)
    expect(page.get_by_role("dialog")).to_be_hidden()


@pytest.mark.parametrize("scheme", COLORS)
def test_the_page_follows_the_colors_of_the_system(page, scheme):
    page.emulate_media(color_scheme=scheme)
    open_page(page)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == COLORS[scheme]


def test_nothing_is_wider_than_a_small_telephone(page):
    word = "w" * 200
    found = document(id=word, title=word, text=word, same_text=[word])
    answer(page, "/v1/search", body={"data": [found], "usage": {"prompt_tokens": 1}})
    answer(page, "/v1/chat/completions", events=[piece(word, documents=[found]), error(word)])
    page.set_viewport_size({"width": 360, "height": 640})
    open_page(page)
    search(page, k=1)
    too_wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(too_wide)
    page.get_by_role("link", name="Chat").click()
    page.get_by_role("switch").check()
    page.get_by_text("Settings").click()
    ask(page, word)
    expect(page.get_by_role("alert")).to_be_visible()
    assert not page.evaluate(too_wide)


def test_every_control_has_a_name(page):
    open_page(page)
    expect(page.locator("#corpus")).to_contain_text("documents")  # it comes last: no control does after it
    for area in ("Search", "Chat"):
        page.get_by_role("link", name=area).click()
        expect(page.locator(f"#{area.lower()}-area")).to_be_visible()
        for control in page.locator(":is(input, select, textarea, button, a):visible").all():
            assert '"' in control.aria_snapshot(), control.evaluate("node => node.outerHTML")


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", COLORS)
def test_text_and_controls_have_the_contrast_that_wcag_asks_for(page, scheme):
    page.emulate_media(color_scheme=scheme)
    open_page(page)
    color = page.evaluate("""() => {
        const style = getComputedStyle(document.documentElement);
        return Object.fromEntries([...style].filter((name) => name.startsWith("--"))
            .map((name) => [name.slice(2), style.getPropertyValue(name)]));
    }""")
    backgrounds = ("paper", "sheet", "tint", "raised")
    text = [(front, back) for front in ("ink", "muted", "accent") for back in backgrounds[:3]]
    text += [("ink", "raised"), ("on-accent", "accent")]
    text += [(front, "warn-tint") for front in ("ink", "muted", "warn")]
    for pair, least in [(pair, 4.5) for pair in text] + [(("edge", back), 3) for back in backgrounds[:2]]:
        lighter, darker = sorted((luminance(color[name].strip()) for name in pair), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= least, pair
