// Keeps a run's numbers as they are while it goes on. Without it the page shows them as they were.
"use strict";

const section = document.querySelector("[data-events]");
const part = (name) => section.querySelector(`[data-live="${name}"]`);
const grouped = (number) => number.toLocaleString("en-US");

function show(run) {
  part("done").textContent = grouped(run.done);
  part("total").textContent = grouped(run.total);
  const bar = part("bar");
  bar.max = Math.max(1, run.total);
  bar.value = run.done;
  const badge = part("badge").firstElementChild;
  badge.textContent = run.badge;
  badge.className = `badge r-${run.state}`;
  for (const [state, count] of Object.entries(run.counts)) {
    const item = section.querySelector(`[data-count="${state}"]`);
    item.hidden = count === 0;
    item.querySelector("b").textContent = grouped(count);
  }
}

// Screen readers hear this part: said when it changes, not with every number.
function say(sentence) {
  if (part("status").textContent !== sentence) part("status").textContent = sentence;
}

const source = new EventSource(section.dataset.events);
source.addEventListener("open", () => say("Live: these numbers move by themselves."));
source.addEventListener("progress", (event) => show(JSON.parse(event.data)));
source.addEventListener("end", (event) => {
  show(JSON.parse(event.data));
  source.close();
  say("It has ended. Reload the page to see its jobs as they ended.");
});
source.addEventListener("error", () => {
  if (source.readyState === EventSource.CLOSED) say("No longer live; reload the page to see more.");
  else say("The connection was lost; trying again.");
});
