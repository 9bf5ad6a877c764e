"use strict";

// The server renders the pages. This follows /api/v1/events: words are put in place as they come; whenever a call
// begins, is answered or ends, and after every reconnect, the page is fetched again and its <main> replaced.

const RETRY_MS = 3000;
const main = () => document.getElementById("main");
const follows = (callId) => ["all", callId].includes(main().dataset.follow);

function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [hour, minute, second] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hour ? `${hour}:${two(minute)}:${two(second)}` : `${minute}:${two(second)}`;
}

function localTime(at, shown) {
  const today = at.toDateString() === new Date().toDateString();
  const day = { day: "numeric", month: "short", ...(shown === "full" && { year: "numeric" }) };
  const time = { hour: "2-digit", minute: "2-digit" };
  return at.toLocaleString(undefined, shown === "day" && today ? time : { ...day, ...time });
}

function tellTimes() {
  for (const time of document.querySelectorAll("time[data-shown]")) {
    time.textContent = localTime(new Date(time.dateTime), time.dataset.shown);
  }
  for (const counter of document.querySelectorAll("[data-since]")) {
    counter.textContent = clock((Date.now() - new Date(counter.dataset.since)) / 1000);
  }
}

// -- words ---------------------------------------------------------------------------------------------------------

function place(list, number) {
  const lines = [...list.children];
  const known = lines.find((line) => Number(line.dataset.number) === number);
  if (known) return known;
  const line = document.getElementById("line").content.firstElementChild.cloneNode(true);
  list.insertBefore(line, lines.find((other) => Number(other.dataset.number) > number) ?? null);
  return line;
}

function fill(line, said, persona) {
  const all = said.heard === null || !said.text.startsWith(said.heard);
  const unheard = all ? "" : said.text.slice(said.heard.length).trimStart();
  line.dataset.number = said.number;
  line.className = `line ${said.role}${said.final ? "" : " open"}`;
  line.querySelector(".name").textContent = said.role === "caller" ? "Caller" : persona;
  line.querySelector(".at").textContent = clock(said.start_s);
  line.querySelector(".heard").textContent = said.text.slice(0, said.text.length - unheard.length);
  line.querySelector(".unheard").textContent = unheard;
}

function say(said) {
  const list = main().querySelector(`[data-words="${CSS.escape(said.call_id)}"]`);
  if (!list) return;
  const keep = Number(list.dataset.keep);
  if (keep && list.children.length >= keep && said.number < Number(list.firstElementChild.dataset.number)) return;
  const below = document.documentElement.scrollHeight - window.scrollY - window.innerHeight;
  fill(place(list, said.number), said, list.dataset.persona);
  while (keep && list.children.length > keep) list.firstElementChild.remove();
  // Who reads the end of a transcript stays at its end; who has scrolled up is left where they are.
  if (!keep && below < 80) window.scrollTo(0, document.documentElement.scrollHeight);
}

// -- the page ------------------------------------------------------------------------------------------------------

let refreshing = false;
let stale = false;
let waiting = [];

async function refresh() {
  stale = true;
  if (refreshing) return;
  refreshing = true;
  try {
    while (stale) {
      stale = false;
      await fetchPage();
    }
  } catch (error) {
    console.warn("the page could not be fetched again and is tried later:", error);
    setTimeout(refresh, RETRY_MS);
  } finally {
    refreshing = false;
    // Words that came meanwhile may be newer than the page that was fetched.
    waiting.forEach(say);
    waiting = [];
  }
}

async function fetchPage() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (!answer.ok) throw new Error(`the service answered ${answer.status}`);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const focused = document.activeElement?.id;
  main().replaceWith(document.adoptNode(fresh.getElementById("main")));
  document.title = fresh.title;
  tellTimes();
  if (!main().dataset.follow) leave();
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

// -- the feed ------------------------------------------------------------------------------------------------------

let feed = null;

function show(state, text) {
  const shown = document.getElementById("feed");
  shown.dataset.state = state;
  shown.textContent = text;
}

// The call has ended: nothing on its page can change any more.
function leave() {
  feed?.close();
  show("", "");
}

function follow() {
  feed = new EventSource("/api/v1/events");
  const call = (event) => {
    const callId = JSON.parse(event.data).call_id;
    if (follows(callId)) refresh();
  };
  feed.addEventListener("hello", () => {
    show("live", "Live");
    refresh();
  });
  for (const type of ["call.started", "call.answered", "call.ended"]) feed.addEventListener(type, call);
  feed.addEventListener("transcript.updated", (event) => {
    const said = JSON.parse(event.data);
    if (refreshing) waiting.push(said);
    else say(said);
  });
  feed.addEventListener("error", () => {
    show("lost", "Reconnecting…");
    // The browser tries again on its own, unless the answer was no stream of events at all.
    if (feed.readyState === EventSource.CLOSED) setTimeout(follow, RETRY_MS);
  });
}

tellTimes();
setInterval(tellTimes, 1000);
if (main().dataset.follow) follow();
