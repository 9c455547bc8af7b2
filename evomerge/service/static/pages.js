// What pages do by themselves: they follow the server's events, and check a form as it is filled
// in. Without it everything works, by loading the page again.
"use strict";

const main = document.getElementById("main");

// --- following ---------------------------------------------------------------------------------

const LEAST = 200; // milliseconds between refreshes; at most a fifth of the time is spent on them
const POLL = 2000; // of pages that show what no event tells of
const USED = "a, button, input, select, textarea, summary";

let source = null;
let timer = null;
let isDue = false;
let last = "";

function say(text) {
  document.getElementById("said").textContent = text;
}

function label(element) {
  return element?.getAttribute("aria-label");
}

function show(text) {
  const live = document.getElementById("live");
  live.hidden = false;
  live.textContent = text;
}

/** Put what has changed of another version of this page into it, but under nobody's hands. */
function take(text) {
  const other = new DOMParser().parseFromString(text, "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const found = other.getElementById(part.id);
    const active = part.contains(document.activeElement) ? document.activeElement : null;
    const isUsed = part.querySelector("details[open] form, input:checked") || active?.matches(USED);
    if (!found || isUsed || found.innerHTML === part.dataset.was) continue;
    const wide = [...part.querySelectorAll(".scroll")].map((one) => [label(one), one.scrollLeft]);
    const open = [...part.querySelectorAll("details[open][id]")].map((one) => one.id);
    const was = label(active);
    part.dataset.was = found.innerHTML;
    part.replaceChildren(...found.childNodes);
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    for (const one of part.querySelectorAll(".scroll")) {
      one.scrollLeft = wide.find(([name]) => name === label(one))?.[1] ?? 0;
      if (was && label(one) === was) one.focus({ preventScroll: true });
    }
  }
}

async function refresh() {
  const began = performance.now();
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (answer.redirected || !answer.ok) return location.reload();
    const text = await answer.text();
    if ("reload" in main.dataset && !text.includes("data-reload")) return location.reload();
    take(text);
  } catch {
    show("The server does not answer; trying again");
  }
  timer = setTimeout(rested, Math.max(LEAST, 4 * (performance.now() - began)));
}

function rested() {
  timer = null;
  if (isDue) soon();
}

function soon() {
  isDue = true;
  if (timer !== null) return;
  isDue = false;
  timer = setTimeout(refresh, 0);
}

function told(event) {
  const pulse = JSON.parse(event.data);
  const words = `${pulse.search}: ${pulse.state ?? pulse.queued}, generation ${pulse.told} complete`;
  if (main.dataset.events.includes("/searches/") && last && words !== last) say(words);
  last = words;
  soon();
}

function follow() {
  if (source || document.hidden) return;
  source = new EventSource(main.dataset.events);
  source.addEventListener("state", told);
  source.addEventListener("news", soon);
  source.addEventListener("reset", soon);
  source.addEventListener("open", () => show("Live"));
  source.addEventListener("error", () => show("Not live: connecting again"));
}

// A browser has few connections to a server: pages that nobody sees keep none.
function leave() {
  source?.close();
  source = null;
}

if (main.dataset.events) {
  for (const part of document.querySelectorAll("[data-live]")) part.dataset.was = part.innerHTML;
  follow();
  document.addEventListener("visibilitychange", () => (document.hidden ? leave() : (follow(), soon())));
  addEventListener("pagehide", leave);
  addEventListener("pageshow", (event) => event.persisted && follow());
  if ("poll" in main.dataset) setInterval(() => document.hidden || soon(), POLL);
}

// --- checking a form ---------------------------------------------------------------------------

const PAUSE = 700; // milliseconds after the last key

for (const form of document.querySelectorAll("form[data-check]")) {
  const checked = document.getElementById("checked");
  let waiting = null;
  let isAsking = false;

  /** One at a time: the server has a process of its own look at each job. */
  async function check() {
    waiting = null;
    if (isAsking || !form.checkValidity()) return;
    const body = new URLSearchParams(new FormData(form));
    body.set("action", "plan");
    isAsking = true;
    checked.setAttribute("aria-busy", "true");
    try {
      // Not form.action: buttons have that name.
      const answer = await fetch(form.getAttribute("action"), { method: "POST", body });
      const other = new DOMParser().parseFromString(await answer.text(), "text/html");
      checked.replaceChildren(...other.getElementById("checked").childNodes);
    } catch {
      checked.textContent = "The server does not answer.";
    }
    checked.removeAttribute("aria-busy");
    isAsking = false;
    const now = new URLSearchParams(new FormData(form));
    now.set("action", "plan");
    if (now.toString() !== body.toString() && waiting === null) check();
  }

  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(check, PAUSE);
  });
}
