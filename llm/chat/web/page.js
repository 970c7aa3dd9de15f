// The chat page. Everything that a person or a model wrote is put on the page with textContent, so it is text and never a script.
"use strict";

const at = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "seed"];
let turns = [];       // {role, content}; a question and its answer by turns
let answering = null; // the AbortController of the answer that is being written

function show() {
  at("talk").replaceChildren(...turns.map(turnElement));
  at("talk").scrollTop = at("talk").scrollHeight;
  at("send").hidden = answering !== null;
  at("stop").hidden = answering === null;
  at("again").disabled = answering !== null || turns.length === 0;
}

function turnElement(turn, index) {
  const box = document.createElement("div");
  box.className = `turn ${turn.role === "user" ? "user" : "assistant"}`;
  const said = document.createElement("div");
  said.className = "said";
  said.textContent = turn.content;
  box.append(said);
  if (turn.role === "user" && answering === null) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Edit";
    button.addEventListener("click", () => edit(index));
    box.append(button);
  }
  return box;
}

function edit(index) {
  at("text").value = turns[index].content;
  turns = turns.slice(0, index);
  keep();
  show();
  at("text").focus();
}

function keep() { // for a reload of this tab, and nowhere else
  try {
    sessionStorage.setItem("turns", JSON.stringify(turns));
  } catch { /* full or forbidden: then a reload begins anew */ }
}

function restore() {
  try {
    const kept = JSON.parse(sessionStorage.getItem("turns")) ?? [];
    turns = kept.filter((t) => ["user", "assistant"].includes(t.role) && typeof t.content === "string");
  } catch { turns = []; }
}

function request() {
  const system = at("system").value.trim();
  const body = { model: at("model").value, stream: true, messages: [...(system ? [{ role: "system", content: system }] : []), ...turns] };
  for (const name of NUMBERS) if (at(name).value !== "") body[name] = Number(at(name).value);
  return body;
}

async function answer() {
  if (answering !== null) return;
  answering = new AbortController();
  at("trouble").textContent = "";
  const body = request();
  const reply = { role: "assistant", content: "" };
  turns.push(reply);
  show();
  const said = at("talk").lastElementChild.querySelector(".said");
  try {
    for await (const piece of pieces(body, answering.signal)) {
      reply.content += piece;
      said.append(document.createTextNode(piece));
      at("talk").scrollTop = at("talk").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") at("trouble").textContent = error.message;
    if (reply.content === "" && turns.at(-1) === reply) turns.pop();
  }
  answering = null;
  keep();
  show();
}

async function* pieces(body, signal) { // the texts of a stream of server-sent events
  const headers = { "Content-Type": "application/json" };
  const response = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error(await complaint(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server has ended the answer early");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      const content = JSON.parse(event.slice("data: ".length));
      if (content.error) throw new Error(content.error.message);
      yield content.choices[0]?.delta.content ?? "";
    }
  }
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server says ${response.status}`;
  }
}

function send(event) {
  event.preventDefault();
  const text = at("text").value.trim();
  if (text === "" || answering !== null) return;
  at("text").value = "";
  turns.push({ role: "user", content: text });
  answer();
}

function again() {
  if (turns.at(-1)?.role === "assistant") turns.pop();
  answer();
}

async function listModels() {
  try {
    const models = (await (await fetch("v1/models")).json()).data;
    at("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  } catch {
    at("trouble").textContent = "the server does not answer";
  }
}

at("form").addEventListener("submit", send);
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
at("stop").addEventListener("click", () => answering?.abort());
at("again").addEventListener("click", again);
at("new").addEventListener("click", () => {
  answering?.abort();
  turns = [];
  at("trouble").textContent = "";
  keep();
  show();
});
restore();
listModels();
show();
