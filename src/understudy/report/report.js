// Redraws the examples' bars when the temperature or the model beside the teacher changes. No network, no storage.
"use strict";

const examples = JSON.parse(document.getElementById("examples-data").textContent);
const slider = document.getElementById("temperature");

function softened(logits, temperature) {
  const top = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp((logit - top) / temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

function show(row, kind, share) {
  const known = share !== null;
  row.querySelector(`rect.${kind}`).setAttribute("width", `${known ? 100 * Math.max(0, share) : 0}%`);
  row.querySelector(`.value.${kind}`).textContent = known ? `${(100 * share).toFixed(1)}\u00a0%` : "—";
}

function fill(rows, kind, logits, temperature) {
  const shares = logits ? softened(logits, temperature) : null;
  let rest = 1;
  for (const row of rows) {
    const index = Number(row.dataset.class);
    const share = shares && (index < 0 ? rest : shares[index]);
    show(row, kind, share);
    rest -= share ?? 0;
  }
}

function redraw() {
  const temperature = Number(slider.value);
  const beside = document.querySelector('input[name="beside"]:checked').value;
  document.getElementById("temperature-shown").textContent = temperature.toFixed(1);
  for (const bars of document.querySelectorAll(".bars")) {
    const example = examples[Number(bars.dataset.example)];
    const rows = [...bars.querySelectorAll(".row")];
    fill(rows, "teacher", example.teacher, temperature);
    fill(rows, "beside", example[beside], temperature);
    for (const bar of bars.querySelectorAll("rect.beside")) bar.setAttribute("class", `beside ${beside}`);
  }
}

for (const input of document.querySelectorAll("#controls input")) input.addEventListener("input", redraw);
document.getElementById("controls").hidden = false;
redraw();
