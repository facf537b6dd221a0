// What is typed and shown goes to this page's own server, and what it tells is shown as it comes.

const $ = (id) => document.getElementById(id);
const made = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
const form = $("form"), question = $("question"), image = $("image");
let request = null;  // what was asked before the question became an image
let running = null;  // the stream that is read, to be left

// --- the image ---

function show(address, caption = "") {
  image.hidden = $("remove").hidden = !address;
  $("none").hidden = Boolean(address);
  if (address) image.src = address; else image.removeAttribute("src");
  $("caption").textContent = caption;
}

function asked(more = {}) {
  return { question: question.value, image: image.getAttribute("src"), ...more };
}

function open(file) {
  if (!file) return;
  const reader = new FileReader();
  reader.onload = () => show(reader.result);
  reader.onerror = () => say("This file cannot be read.", true);
  reader.readAsDataURL(file);
}

$("file").addEventListener("change", () => open($("file").files[0]));
$("remove").addEventListener("click", () => { $("file").value = ""; show(null); $("file").focus(); });
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) { event.preventDefault(); open(file); }
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") open(event.dataTransfer.files[0]);
  });
}

// --- what the server is asked ---

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", wrong);
}

async function post(path, body) {
  running?.abort();
  running = new AbortController();
  const response = await fetch(path, {
    method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal: running.signal,
  });
  if (!response.ok) throw new Error(await reason(response));
  return response;
}

async function reason(response) {
  const told = await response.json().catch(() => ({}));
  return told.reason ?? told.detail ?? `The server answered ${response.status}.`;
}

async function* events(response) {
  let rest = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

async function work(what, path, body, handle) {
  say(what);
  try {
    const response = await post(path, body);
    for await (const event of events(response)) {
      if (event.kind === "failed") throw new Error(event.reason);
      handle(event);
    }
    say("Done.");
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  } finally {
    for (const pane of document.querySelectorAll(".pane")) pane.ariaBusy = "false";
  }
}

async function take(name) {
  if (name !== "typographic" && request !== null) { question.value = request; request = null; }
  try {
    const typed = request ?? question.value;
    const given = await (await post("preset", { question: typed, preset: name })).json();
    if (given.question) { request = typed; question.value = given.question; }
    $("file").value = "";
    show(given.image, given.caption);
    say("");
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
}

for (const button of document.querySelectorAll("[data-preset]")) {
  button.addEventListener("click", () => take(button.dataset.preset));
}
for (const button of document.querySelectorAll("[data-question]")) {
  button.addEventListener("click", () => {
    request = null;
    question.value = button.dataset.question;
    if (button.dataset.with) take(button.dataset.with);
  });
}
question.addEventListener("input", () => { request = null; });
for (const button of document.querySelectorAll("[data-against]")) {
  button.addEventListener("click", () => {
    if (request !== null) { question.value = request; request = null; show(null); }
    work("The attack begins …", "attack", asked({ against: button.dataset.against }), (event) => {
      if (event.kind === "step") say(`Step ${event.done} of at most ${event.total} …`);
      if (event.kind !== "captioned") return;
      show(event.image, event.caption);
      if (button.dataset.against === "edit") $("response").value = "edit";  // or the image has no part in the answer
    });
  });
}

// --- both answers ---

function clear() {
  for (const answer of document.querySelectorAll(".answer")) answer.textContent = "";
  $("same").textContent = "";
  $("receipt").hidden = $("read").hidden = true;
  $("unguarded").ariaBusy = "true";
}

const handlers = {
  read: ({ pieces }) => {
    $("pieces").replaceChildren(...pieces.flatMap(({ text, tokens, fate }) => {
      const written = text.replaceAll("\n", "↵") + (fate === "dropped" && tokens > 1 ? ` × ${tokens}` : "");
      return [made(fate === "dropped" ? "del" : "span", fate, written), " "];
    }));
    $("read").hidden = false;
    say("Without the guard …");
  },
  answer: ({ pane, text }) => {
    $(pane).querySelector(".answer").textContent = text;
  },
  decided: ({ words, bars, policy }) => {
    $("receipt").dataset.decision = words.decision;
    $("verdict").textContent = words.title;
    $("sentences").replaceChildren(...words.sentences.map((sentence) => made("li", "", sentence)));
    $("measured").hidden = bars.length === 0;
    $("bars").replaceChildren(...bars.map(drawn));
    $("policy").textContent = policy;
    $("receipt").hidden = false;
    say("Under the guard …");
  },
  over: () => {
    $("unguarded").ariaBusy = "false";
    $("guarded").ariaBusy = "true";
    say("The guard is being attached and verified …");
  },
  compared: ({ same }) => {
    $("same").textContent = same ? "The same as without the guard, token for token." : "Another answer than without the guard.";
  },
};

function drawn({ label, hint, value, limit, passes, start, length, mark }) {
  const item = made("li", passes ? "passes" : "");
  const number = (x) => x.toFixed(2).replace("-", "−");
  const words = `${number(value)}, ${passes ? "above" : "not above"} ${number(limit)}`;
  const numbers = made("div", "numbers");
  numbers.append(made("b", "", label), made("span", "", words));
  item.append(numbers, track(start, length, mark), made("div", "note", hint));
  return item;
}

function track(start, length, mark) {
  const svg = shape("svg", { class: "track", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(
    shape("rect", { class: "ground", width: 100, height: 10 }),
    shape("rect", { class: "value", x: start, width: length, y: 2, height: 6 }),
    shape("line", { class: "zero", x1: 50, x2: 50, y1: 0, y2: 10 }),
    shape("line", { class: "mark", x1: mark, x2: mark, y1: 0, y2: 10 }),
  );
  return svg;
}

function shape(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  clear();
  work("Waiting for the model …", "compare", asked({ response: $("response").value || null }), (told) => handlers[told.kind]?.(told));
});
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

const about = await (await fetch("about")).json();
$("model").textContent = about.model;
const [fitted] = $("response").options, own = [...$("response").options].find(({ value }) => value === about.response);
fitted.textContent = `as fitted: ${own.textContent}`;
