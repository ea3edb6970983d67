"use strict";
// Tables: a click on a heading (or Enter, or the space bar) sorts by its column; numbers as numbers, text as people read
// it, what is empty always at the end.
const order = new Intl.Collator("en", { numeric: true });

function compare(a, b, direction) {
  if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
  const x = Number(a), y = Number(b);
  return direction * (isNaN(x) || isNaN(y) ? order.compare(a, b) : x - y);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.sort;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(value(a), value(b), direction));
    table.tBodies[0].append(...rows);
  }));
}
