// Tables sort by the heading that is pressed; the runs of a line open below it.
"use strict";

function sorted(table, column, descending) {
  const value = (body) => {
    const cell = body.rows[0].cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return cell.textContent.trim().toLowerCase();
  };
  const bodies = Array.from(table.tBodies).map((body) => [value(body), body]);
  const kind = (v) => (v === "" ? 2 : typeof v === "number" ? 0 : 1);
  bodies.sort(([a], [b]) => {
    // Numbers, then words, then nothing, in whichever direction.
    if (kind(a) !== kind(b)) return kind(a) - kind(b);
    const order = a < b ? -1 : a > b ? 1 : 0;
    return descending ? -order : order;
  });
  return bodies.map(([, body]) => body);
}

function sort(heading) {
  const table = heading.closest("table");
  const column = Number(heading.dataset.column);
  const numbers = table.querySelector(
    `tbody > tr:first-child > td:nth-child(${column + 1})[data-value]`);
  const before = heading.getAttribute("aria-sort");
  // The best number first, words from A.
  const first = numbers ? "descending" : "ascending";
  const other = numbers ? "ascending" : "descending";
  const now = before === first ? other : first;
  for (const th of table.querySelectorAll("th[aria-sort]")) {
    th.setAttribute("aria-sort", "none");
  }
  heading.setAttribute("aria-sort", now);
  table.append(...sorted(table, column, now === "descending"));
}

function open(button, wanted) {
  const runs = document.getElementById(button.getAttribute("aria-controls"));
  runs.hidden = !wanted;
  button.setAttribute("aria-expanded", String(wanted));
}

function follow() {
  const line = document.getElementById(location.hash.slice(1));
  const button = line && line.querySelector("button.runs");
  if (button) {
    open(button, true);
    button.focus();
  }
}

for (const heading of document.querySelectorAll("th[aria-sort]")) {
  heading.querySelector("button").addEventListener("click", () => sort(heading));
}
for (const button of document.querySelectorAll("button.runs")) {
  open(button, false);
  button.addEventListener("click", () => {
    open(button, button.getAttribute("aria-expanded") !== "true");
  });
}
window.addEventListener("hashchange", follow);
follow();
