"use strict";
// The viewer: one picture in full, or two of one prompt with a slider between them. Without it the page still reads.
const viewer = document.getElementById("viewer");
if (viewer) {
  const part = (name) => viewer.querySelector(`[data-part="${name}"]`);
  const [left, right] = [part("left"), part("right")];
  const split = part("split");
  let group = []; // buttons of one prompt

  const options = (select, chosen) => {
    select.replaceChildren(...group.map((button, k) => new Option(button.dataset.name, k, false, k === chosen)));
  };
  const show = () => {
    const [one, other] = [left, right].map((select) => group[select.value]);
    for (const [name, button] of [["under", other], ["over", one]]) {
      part(name).src = button.querySelector("img").src;
      part(name).alt = button.querySelector("img").alt;
    }
    viewer.style.setProperty("--split", `${split.value}%`);
    split.disabled = one === other;
    part("handle").hidden = one === other;
  };
  const open = (button) => {
    group = [...button.closest("[data-group]").querySelectorAll("button[data-name]")];
    const at = group.indexOf(button);
    const named = (row) => group.findIndex((other) => other.dataset.row === row);
    const [teacher, student] = named("teacher") < 0 ? [0, Math.min(1, group.length - 1)] : [named("teacher"), named("student")];
    part("prompt").textContent = button.closest("[data-group]").dataset.group;
    // A picture is held against the teacher's, the teacher's own against the student's; of a sweep at the same scale.
    const same = group.findIndex((other) => other !== button && other.dataset.scale === button.dataset.scale);
    const partner = button.dataset.scale ? same : at === teacher ? student : teacher;
    const pair = partner < 0 ? [at, at] : [Math.min(at, partner), Math.max(at, partner)];
    options(left, pair[0]);
    options(right, pair[1]);
    split.value = 50;
    show();
    if (!viewer.open) viewer.showModal();
  };
  const step = (by) => {
    const prompts = [...document.querySelectorAll("[data-group]")];
    const here = prompts.indexOf(group[0].closest("[data-group]"));
    const next = prompts[(here + by + prompts.length) % prompts.length];
    const [row, scale] = [group[left.value].dataset.row, group[left.value].dataset.scale];
    const buttons = [...next.querySelectorAll("button[data-name]")];
    open(buttons.find((b) => b.dataset.row === row && b.dataset.scale === scale) || buttons[0]);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-name]");
    if (button) open(button);
  });
  for (const control of [left, right, split]) control.addEventListener("input", show);
  part("previous").addEventListener("click", () => step(-1));
  part("next").addEventListener("click", () => step(1));
  part("close").addEventListener("click", () => viewer.close());
}
