"use strict";
// Shows the failures that fit every chosen filter and counts them.
const filters = [...document.querySelectorAll("[data-filter]")];
const cases = [...document.querySelectorAll("#cases details")];
const shown = document.getElementById("shown");

function fits(item, filter) {
  if (!filter.value) return true;
  if (filter.dataset.filter === "text") return item.textContent.toLowerCase().includes(filter.value.toLowerCase());
  return JSON.parse(item.dataset[filter.dataset.filter]).includes(filter.value);
}

function update() {
  let count = 0;
  for (const item of cases) {
    item.hidden = !filters.every((filter) => fits(item, filter));
    count += item.hidden ? 0 : 1;
  }
  shown.textContent = count + " of " + cases.length + " shown";
}

for (const filter of filters) filter.addEventListener("input", update);
update();
