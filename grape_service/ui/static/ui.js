"use strict";
(() => {
  // A table that is wider than the window says that it has more columns.
  for (const region of document.querySelectorAll(".scroll")) {
    const note = document.createElement("span");
    note.className = "further";
    note.textContent = "more columns to the right →";
    region.before(note);
    const look = () => { note.hidden = region.scrollWidth <= region.clientWidth + 1; };
    look();
    addEventListener("resize", look);
  }

  // Pages that change while they are looked at say how often, in seconds.
  const live = document.getElementById("live");
  if (live) {
    setInterval(async () => {
      if (document.hidden || live.contains(document.activeElement)) return;
      const answer = await fetch(location.href).catch(() => null);
      if (!answer || !answer.ok) return;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("live");
      if (fresh) live.replaceChildren(...fresh.childNodes);
    }, 1000 * Number(live.dataset.every));
  }

  const readout = document.getElementById("readout");
  if (!readout) return;
  const radios = [...document.querySelectorAll("input[name=mode]")];
  const names = radios.map((radio) => radio.dataset.name);
  const tokens = [...document.querySelectorAll(".tokens span")];
  const scales = {
    "log-probability": "the darker, the less probable under the target; full colour at -5.5 and below",
    ratio: "orange: less probable under the target than under its behavior policy; blue: more probable; only kept rows have ratios",
    weight: "orange: weighs less than 1; blue: more; full colour at a third and at three times; only kept rows have weights",
  };
  const orange = (strength) => `rgba(217,105,43,${Math.min(0.55, strength).toFixed(3)})`;
  const blue = (strength) => `rgba(61,125,202,${Math.min(0.55, strength).toFixed(3)})`;
  const largest = names.map((_, mode) => tokens.reduce((most, token) => Math.max(most, Math.abs(Number(token.dataset[mode] ?? 0))), 1e-9));
  const shade = (mode, value) => {
    if (value === undefined) return "";
    const v = Number(value);
    if (names[mode] === "log-probability") return orange(-v / 10);
    if (names[mode] === "ratio" || names[mode] === "weight") {
      const signed = names[mode] === "ratio" ? v : Math.log(Math.max(v, 1e-5));
      return signed < 0 ? orange(-signed / 2) : blue(signed / 2);
    }
    return orange((0.55 * Math.abs(v)) / largest[mode]);
  };
  const paint = (mode) => {
    document.getElementById("scale").textContent = scales[names[mode]] ?? `the darker, the larger; full colour at ${largest[mode]}; only kept rows have it`;
    for (const token of tokens) token.style.background = shade(mode, token.dataset[mode]);
  };
  const tell = (token) => {
    const parts = names.map((name, i) => (token.dataset[i] === undefined ? null : `${name} ${token.dataset[i]}`)).filter(Boolean);
    readout.textContent = `“${token.textContent}”: ${parts.join(", ") || "no numbers"}`;
  };
  for (const radio of radios) radio.addEventListener("change", () => paint(Number(radio.value)));
  for (const box of document.querySelectorAll(".tokens")) {
    let at = -1;
    const move = (place) => {
      if (!box.children.length) return;
      if (at >= 0) box.children[at].classList.remove("at");
      at = Math.max(0, Math.min(box.children.length - 1, place));
      box.children[at].classList.add("at");
      box.children[at].scrollIntoView({ block: "nearest", inline: "nearest" });
      tell(box.children[at]);
    };
    box.addEventListener("mouseover", (event) => { if (event.target !== box) tell(event.target); });
    box.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
        move(at + (event.key === "ArrowRight" ? 1 : -1));
        event.preventDefault();
      }
    });
  }
  const checked = radios.find((radio) => radio.checked);
  if (checked) paint(Number(checked.value));
})();
