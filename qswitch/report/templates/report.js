"use strict";
// Without this script the page shows every run and every rollout, one below the other. Text is only ever set as text.

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// One run at a time; the address remembers which.
const tabs = [...document.querySelectorAll('[role="tab"]')];
function showRun(chosen) {
  for (const [i, tab] of tabs.entries()) {
    tab.setAttribute("aria-selected", i === chosen);
    tab.tabIndex = i === chosen ? 0 : -1;
    document.getElementById(tab.getAttribute("aria-controls")).hidden = i !== chosen;
  }
}
if (tabs.length) {
  tabs[0].parentElement.hidden = false;
  for (const [i, tab] of tabs.entries()) {
    tab.addEventListener("click", () => { showRun(i); history.replaceState(null, "", "#run-" + (i + 1)); });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = tabs[(i + step + tabs.length) % tabs.length];
      next.click();
      next.focus();
    });
  }
  const asked = tabs.findIndex((tab) => "#" + tab.getAttribute("aria-controls") === location.hash);
  showRun(Math.max(asked, 0));
}

// What is known of a token, with the divergence as a bar and the threshold as a mark on it.
function describe(token, detail) {
  const { jsd, threshold, student, teacher } = token.dataset;
  const list = element("dl", "");
  const add = (name, value) => {
    list.append(element("dt", name));
    const place = element("dd", "");
    place.append(value);
    list.append(place);
  };
  add("written by the", token.classList[1]);
  const visible = (text) => element("code", text.replaceAll("\n", "↵").replaceAll(" ", "·"));
  if (student !== undefined) add("the student would write", visible(student));
  if (teacher !== undefined) add("the teacher would write", visible(teacher));
  detail.replaceChildren();
  if (jsd !== undefined) {
    const relation = threshold === undefined ? "" : (+jsd <= +threshold ? " ≤ threshold " : " > threshold ") + threshold;
    detail.append(element("p", "JSD " + jsd + relation + " bits"));
    const meter = element("div", "", { class: "meter" });
    meter.append(element("i", "", { style: "width: " + 100 * +jsd + "%" }));
    if (threshold !== undefined) meter.append(element("b", "", { style: "left: " + 100 * Math.min(+threshold, 1) + "%" }));
    detail.append(meter);
  }
  detail.append(list);
}

for (const browser of document.querySelectorAll(".transcripts")) {
  const sections = [...browser.querySelectorAll(".rollout")];
  const bar = browser.querySelector(".browse");
  const choice = bar.querySelector("select");
  const detail = browser.querySelector(".detail");
  bar.hidden = detail.hidden = false;

  const look = (token) => {
    browser.querySelector(".current")?.classList.remove("current");
    token.classList.add("current");
    describe(token, detail);
  };
  const show = (index) => {
    choice.selectedIndex = (index + sections.length) % sections.length;
    sections.forEach((section, i) => { section.hidden = i !== choice.selectedIndex; });
    const shown = sections[choice.selectedIndex];
    look(shown.querySelector(".w.teacher") ?? shown.querySelector(".w")); // the first intervention, as an example
  };
  choice.addEventListener("change", () => show(choice.selectedIndex));
  bar.querySelector(".previous").addEventListener("click", () => show(choice.selectedIndex - 1));
  bar.querySelector(".next").addEventListener("click", () => show(choice.selectedIndex + 1));
  for (const event of ["pointerover", "click"]) {
    browser.addEventListener(event, ({ target }) => { if (target.classList.contains("w")) look(target); });
  }
  browser.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !event.target.classList.contains("text")) return;
    event.preventDefault();
    const tokens = [...event.target.children];
    const at = tokens.findIndex((token) => token.classList.contains("current"));
    look(tokens[Math.min(Math.max(at + step, 0), tokens.length - 1)]);
  });
  show(0);
}
