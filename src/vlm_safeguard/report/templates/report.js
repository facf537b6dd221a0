"use strict";
// Tables: a click on a heading sorts by it; first as the cells read best, then the other way.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 3) continue;
  for (const heading of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => {
        const cell = row.cells[heading.cellIndex];
        return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort);
      };
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "") || 0; // empty cells stay last
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
        return up ? order : -order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  }
}

// Answers: columns of values; only one page of them is ever in the document.
const form = document.getElementById("filters");
if (form) {
  const PAGE = 20;
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (name, row) => {
    const column = data.columns[name];
    return column.is ? column.is[row] : column.of[column.at[row]];
  };
  const receipts = Object.keys(data.columns).filter((name) => name.startsWith("receipt "));
  const list = document.getElementById("list");
  const count = document.getElementById("count");
  let matches = [];
  let first = 0;

  const element = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text; // never as HTML: answers are not trusted
    if (className) node.className = className;
    return node;
  };
  const fold = (title, fill) => {
    const node = element("details");
    node.append(element("summary", title));
    node.addEventListener("toggle", () => { if (node.open && node.childNodes.length === 1) node.append(fill()); });
    return node;
  };

  const choices = (name) => {
    const seen = new Set();
    for (let row = 0; row < data.rows; row++) {
      const value = get(name, row);
      for (const one of name === "tags" ? value.split("\n") : [value]) if (one) seen.add(one);
    }
    const all = name === "tags" ? [...seen].sort() : [...seen];
    form.elements[name].replaceChildren(new Option("all", ""), ...all.map((value) => new Option(value, value)));
  };

  const receipt = (row) => {
    const node = element("dl");
    for (const name of receipts) {
      const value = get(name, row);
      if (value === null || value === "") continue;
      const shown = value === true ? "yes" : value === false ? "no" : String(value);
      node.append(element("dt", name.slice(8).replaceAll("_", " ")), element("dd", shown));
    }
    return node;
  };

  const card = (row) => {
    const node = element("article");
    const tags = element("ul", undefined, "tags");
    for (const name of ["benchmark", "condition", "defence"]) tags.append(element("li", get(name, row)));
    for (const tag of get("tags", row).split("\n").filter(Boolean)) {
      const bad = /: unsafe$|: unreadable$|^wrong$|disagree/.test(tag);
      tags.append(element("li", tag, bad ? "bad" : /: safe$|^right$/.test(tag) ? "good" : ""));
    }
    node.append(tags, element("h3", get("request", row)));
    const answer = () => element("blockquote", get("answer", row) || "(nothing)");
    node.append(get("folded", row) ? fold("Show the answer (it may be harmful)", answer) : answer());
    const notes = get("notes", row);
    if (notes) node.append(fold("What the judges said", () => element("blockquote", notes)));
    if (receipts.some((name) => get(name, row) !== null)) node.append(fold("Receipt", () => receipt(row)));
    const facts = [get("kind", row), get("category", row), get("sample", row), get("image", row), get("facts", row)];
    node.append(element("p", facts.filter(Boolean).join(" · "), "facts"));
    return node;
  };

  const show = () => {
    const cards = matches.slice(first, first + PAGE).map(card);
    list.replaceChildren(...cards);
    let sentence = `${matches.length.toLocaleString("en")} of ${data.rows.toLocaleString("en")} answers.`;
    if (data.rows < data.total) sentence += ` ${data.total.toLocaleString("en")} were given; to keep this page small the rest is in samples.jsonl only.`;
    if (data.cut !== null) sentence += ` Texts are cut after ${data.cut.toLocaleString("en")} characters; whole in samples.jsonl.`;
    count.textContent = sentence;
    document.getElementById("pager").hidden = matches.length <= PAGE;
    document.getElementById("place").textContent = `page ${first / PAGE + 1} of ${Math.ceil(matches.length / PAGE)}`;
    document.getElementById("previous").disabled = first === 0;
    document.getElementById("next").disabled = first + PAGE >= matches.length;
  };

  const filter = () => {
    const wanted = ["benchmark", "condition", "defence"].map((name) => [name, form.elements[name].value]).filter(([, value]) => value);
    const tag = form.elements.tags.value;
    const words = form.elements.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    matches = [];
    for (let row = 0; row < data.rows; row++) {
      if (!wanted.every(([name, value]) => get(name, row) === value)) continue;
      if (tag && !get("tags", row).split("\n").includes(tag)) continue;
      if (words.length) {
        const text = `${get("request", row)}\n${get("answer", row)}`.toLowerCase();
        if (!words.every((word) => text.includes(word))) continue;
      }
      matches.push(row);
    }
    first = 0;
    show();
  };

  const turn = (step) => {
    first += step * PAGE;
    show();
    count.scrollIntoView({ block: "start" });
  };
  let waiting;
  for (const name of ["benchmark", "condition", "defence", "tags"]) choices(name);
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("input", (event) => {
    if (event.target.name !== "search") return;
    clearTimeout(waiting);
    waiting = setTimeout(filter, 150);
  });
  document.getElementById("previous").addEventListener("click", () => turn(-1));
  document.getElementById("next").addEventListener("click", () => turn(1));
  filter();
}
