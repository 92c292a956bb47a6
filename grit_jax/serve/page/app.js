// Texts of models and documents are only ever inserted as text. Addresses are relative, so a proxy may add a prefix.

const KEY = "grit_jax.key";

const METHODS = {
  none: ["No documents", "The question alone, to compare with."],
  query_first: ["Question, then document", "Both are read as text, the question first. Nothing is reused."],
  document_first: ["Document, then question", "Both are read as text, the document first. Nothing is reused."],
  document_cache: ["Cached document", "What embedding computed for the document is reused; the question is read after it."],
  query_cache: ["Cached question", "What the search computed for the question is reused; the document is read after it."],
  query_document_cache: ["Cached question, cached document", "Both are reused, the question first."],
  document_query_cache: ["Cached document, cached question", "Both are reused, the document first."],
};

const SNIPPET_LENGTH = 260;
const READY_MS = 1000; // between checks that the server is ready

const $ = (id) => document.getElementById(id);

// ---- Talking to the server

class ServerError extends Error {
  constructor(message, kind = "") {
    super(message);
    this.kind = kind;
  }

  static of({ message, type, code }) {
    return new ServerError(message, [type, code].filter(Boolean).join(" · "));
  }
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  if (body?.error?.message) return ServerError.of(body.error);
  return new ServerError(`The server answered ${response.status} ${response.statusText}.`.replace(" .", "."));
}

async function send(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
}

async function request(path, options = {}) {
  if (options.body) await unlessAborted(ready, options.signal);
  for (;;) {
    const response = await send(path, options);
    if (response.ok) return response;
    const error = await failure(response);
    if (response.status !== 401 || !(await askForKey(error.message))) throw error;
  }
}

// Settles once the server is ready; earlier requests wait for it.
let ready = Promise.resolve();

async function untilReady() {
  const start = performance.now();
  const pause = () => new Promise((resolve) => { setTimeout(resolve, READY_MS); });
  const line = $("getting-ready");
  try {
    for (;;) {
      const response = await send("health");
      if (!response.ok) throw await failure(response);
      const { ready: done, programs_compiled: programs } = await response.json();
      if (done) return;
      line.textContent = `The model is getting ready: ${counted(programs, "program")} compiled so far, in `
        + `${duration(performance.now() - start)}. What you ask now is answered as soon as it is.`;
      line.hidden = false;
      await pause();
    }
  } finally {
    line.hidden = true;
  }
}

function unlessAborted(promise, signal) {
  if (!signal) return promise;
  return Promise.race([promise, new Promise((_, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
  })]);
}

let keyAnswer = null;

// Requests that are refused together wait for one answer.
function askForKey(reason) {
  keyAnswer ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-reason").textContent = reason;
    $("key").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "given"), { once: true });
    dialog.showModal();
  }).finally(() => { keyAnswer = null; });
  return keyAnswer;
}

function keepKey(event) {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key-dialog").close("given");
}

// The data of server-sent events, up to the one that ends them.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("The answer broke off: the connection was closed.");
    const lines = (buffer + value).split(/\r?\n/);
    buffer = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// ---- Building the page

function build(template) {
  const root = $(`${template}-template`).content.firstElementChild.cloneNode(true);
  const parts = Object.fromEntries([...root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
  return { root, parts };
}

const count = (number) => new Intl.NumberFormat("en").format(number);
const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const facts = (...parts) => parts.filter(Boolean).join(" · ");

function showError(place, error, again) {
  const { root, parts } = build("error");
  parts.message.textContent = error.message;
  parts.kind.textContent = error.kind ?? "";
  parts.again.addEventListener("click", () => { place.replaceChildren(); again(); });
  place.replaceChildren(root);
}

function snippet(text) {
  const line = text.replace(/\s+/g, " ").trim();
  if (line.length <= SNIPPET_LENGTH) return line;
  const cut = line.slice(0, SNIPPET_LENGTH);
  return `${cut.slice(0, Math.max(cut.lastIndexOf(" "), SNIPPET_LENGTH / 2)).trimEnd()}…`;
}

function documentItem({ rank, score, id, title, text, same_text: sameText }) {
  const { root, parts } = build("document");
  const short = snippet(text);
  parts.rank.textContent = rank;
  parts.title.textContent = title || id;
  parts.score.textContent = score.toFixed(3);
  parts.bar.style.inlineSize = `${100 * Math.min(1, Math.max(0, score))}%`;
  parts.text.textContent = short;
  parts.ids.textContent = facts(title && id, sameText?.length && `same text: ${sameText.join(", ")}`);
  parts.more.hidden = short === text;
  parts.more.addEventListener("click", () => {
    const open = parts.more.getAttribute("aria-expanded") === "false";
    parts.more.setAttribute("aria-expanded", open);
    parts.more.textContent = open ? "Show less" : "Show all";
    parts.text.textContent = open ? text : short;
  });
  return root;
}

function grow(textarea) {
  textarea.style.height = "auto";
  textarea.style.height = `${textarea.scrollHeight}px`;
}

function prepareTextarea(textarea) {
  textarea.addEventListener("input", () => grow(textarea));
  textarea.addEventListener("keydown", (event) => {
    // While an input method composes a character, Enter belongs to it.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    textarea.form.requestSubmit();
  });
}

// ---- Search

let searching = null;

async function search() {
  const query = $("query").value.trim();
  if (!query) return;
  searching?.abort();
  const current = (searching = new AbortController());
  const start = performance.now();
  const body = { query, instruction: $("instruction").value.trim(), k: $("results-count").valueAsNumber };
  $("search-error").replaceChildren();
  $("search-status").textContent = "Searching…";
  $("results").setAttribute("aria-busy", "true");
  try {
    const found = await (await request("v1/search", { body, signal: current.signal })).json();
    $("results").replaceChildren(...found.data.map(documentItem));
    $("search-status").textContent = facts(
      counted(found.data.length, "document"),
      counted(found.usage.prompt_tokens, "token"),
      duration(performance.now() - start),
    );
  } catch (error) {
    // A newer search has taken over the page.
    if (current !== searching) return;
    $("search-status").textContent = error.name === "AbortError" ? "Stopped." : "";
    if (error.name !== "AbortError") showError($("search-error"), error, search);
  }
  $("results").removeAttribute("aria-busy");
  searching = null;
}

// ---- Chat

let model = null;
let turns = [];
let answering = null;

const history = () => turns.filter((turn) => turn.answer).flatMap(asMessages);
const asMessages = ({ question, answer }) => [{ role: "user", content: question }, { role: "assistant", content: answer }];

function retrieval() {
  if (!$("use-documents").checked) return undefined;
  return {
    method: $("method").value,
    k: $("documents-count").valueAsNumber,
    instruction: $("chat-instruction").value.trim(),
  };
}

function chatBody(question) {
  const last = { role: "user", content: question };
  const documents = retrieval();
  return {
    model: model.id,
    // An answer from documents is a conversation of one turn.
    messages: documents ? [last] : [...history(), last],
    stream: true,
    stream_options: { include_usage: true },
    temperature: $("temperature").valueAsNumber,
    max_tokens: $("max-tokens").valueAsNumber,
    seed: $("seed").valueAsNumber,
    retrieval: documents,
  };
}

const atBottom = () => innerHeight + scrollY >= document.documentElement.scrollHeight - 48;

// The page follows the answer unless the reader has scrolled away from its end.
function keepingBottom(change) {
  const follow = atBottom();
  change();
  if (follow) scrollTo(0, document.documentElement.scrollHeight);
}

function showDocuments(parts, documents) {
  parts["sources-label"].textContent = `${counted(documents.length, "document")} used`;
  parts.documents.replaceChildren(...documents.map(documentItem));
  parts.sources.hidden = documents.length === 0;
}

function answerFacts({ start, first, usage, reason }) {
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  return facts(
    reason === "length" && "cut at max tokens",
    reason === "stopped" && "stopped",
    usage && `${counted(usage.prompt_tokens, "token")} in${cached ? `, ${count(cached)} cached` : ""}`,
    usage && `${count(usage.completion_tokens)} out`,
    first && `first token ${duration(first - start)}`,
    `total ${duration(performance.now() - start)}`,
  );
}

async function stream(body, turn, parts, measured, signal) {
  const text = parts.answer.appendChild(document.createTextNode(""));
  for await (const event of events(await request("v1/chat/completions", { body, signal }))) {
    if (event.error) throw ServerError.of(event.error);
    const choice = event.choices?.[0];
    const piece = choice?.delta?.content ?? "";
    if (piece) measured.first ??= performance.now();
    measured.reason = choice?.finish_reason ?? measured.reason;
    measured.usage = event.usage ?? measured.usage;
    turn.answer += piece;
    keepingBottom(() => {
      text.appendData(piece);
      if (event.documents) showDocuments(parts, event.documents);
    });
  }
}

async function ask(question) {
  answering?.abort();
  const body = chatBody(question);
  const turn = { question, answer: "" };
  const { root, parts } = build("turn");
  const measured = { start: performance.now() };
  const current = new AbortController();
  turns.push(turn);
  parts.question.textContent = question;
  $("conversation").append(root);
  scrollTo(0, document.documentElement.scrollHeight);
  setAnswering(current);
  let error = null;
  try {
    await stream(body, turn, parts, measured, current.signal);
  } catch (caught) {
    if (caught.name === "AbortError") measured.reason = "stopped";
    else error = caught;
  }
  if (answering === current) setAnswering(null);
  keepingBottom(() => {
    parts.answer.setAttribute("aria-busy", "false");
    parts.answer.classList.toggle("empty", !turn.answer);
    if (error) showError(parts.error, error, () => { forget(turn, root); ask(question); });
    else parts.facts.textContent = answerFacts(measured);
  });
}

function forget(turn, root) {
  turns = turns.filter((other) => other !== turn);
  root.remove();
}

function setAnswering(controller) {
  const focused = document.activeElement;
  answering = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  $("welcome").hidden = turns.length > 0;
  $("clear").disabled = turns.length === 0;
  if (focused === $("send")) $("stop").focus();
  if (focused === $("stop")) $("message").focus();
}

function submitMessage() {
  const question = $("message").value.trim();
  if (answering || !question) return;
  $("message").value = "";
  grow($("message"));
  ask(question);
}

function clearConversation() {
  answering?.abort();
  turns = [];
  $("conversation").replaceChildren();
  setAnswering(null);
  $("message").focus();
}

function showMethod() {
  $("method-panel").hidden = !$("use-documents").checked;
  $("method-note").textContent = `${METHODS[$("method").value]?.[1] ?? ""} Each question is answered by itself.`.trim();
}

// ---- The whole

function showArea() {
  const area = location.hash === "#chat" ? "chat" : "search";
  for (const name of ["search", "chat"]) {
    $(`${name}-area`).hidden = name !== area;
    const link = document.querySelector(`nav a[href="#${name}"]`);
    if (name === area) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${area === "chat" ? "Chat" : "Search"} · grit_jax`;
  $(area === "chat" ? "message" : "query").focus({ preventScroll: true });
}

function showModel() {
  const { index } = model;
  $("model").textContent = facts(model.id, `${count(model.embed_dim)} dims`, `${count(model.max_length)} tokens`);
  $("no-index").hidden = Boolean(index);
  $("with-index").hidden = !index;
  $("documents-switch").hidden = !index;
  for (const label of document.querySelectorAll(".of-documents")) label.hidden = !index;
  if (!index) return;
  const { example } = index;
  $("search-example").hidden = !example;
  if (example) $("try-search").textContent = `“${example.query}”, with the instruction “${example.instruction}”`;
  $("corpus").textContent = `Your query is compared with every text of ${counted(index.documents, "document")}.`;
  $("method").replaceChildren(...index.methods.map((method) => new Option(METHODS[method]?.[0] ?? method, method)));
  $("method").value = index.methods.find((method) => method !== "none") ?? "none";
  showMethod();
}

function tryExample() {
  const { instruction, query } = model.index.example;
  $("instruction").value = instruction;
  $("query").value = query;
  grow($("query"));
  $("search-form").requestSubmit();
}

async function loadModel() {
  ready = untilReady();
  // Shown here, and to requests made meanwhile.
  ready.catch((error) => showError($("notice"), error, loadModel));
  try {
    model = (await (await request("v1/models")).json()).data[0];
    showModel();
    showArea();
  } catch (error) {
    showError($("notice"), error, loadModel);
  }
}

function submits(form, action) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
}

function stopEverything(event) {
  if (event.key !== "Escape" || $("key-dialog").open) return;
  answering?.abort();
  searching?.abort();
}

prepareTextarea($("query"));
prepareTextarea($("message"));
submits($("search-form"), search);
submits($("chat-form"), submitMessage);
// The browser cannot point at a wrong setting that is folded away.
$("settings").addEventListener("invalid", () => { $("settings").open = true; }, true);
$("stop").addEventListener("click", () => answering?.abort());
$("clear").addEventListener("click", clearConversation);
$("try-search").addEventListener("click", tryExample);
$("try-chat").addEventListener("click", () => { $("message").value = $("try-chat").textContent; submitMessage(); });
$("use-documents").addEventListener("change", showMethod);
$("method").addEventListener("change", showMethod);
$("key-form").addEventListener("submit", keepKey);
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
addEventListener("hashchange", showArea);
addEventListener("keydown", stopEverything);
loadModel();
