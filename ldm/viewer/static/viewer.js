// The page: a gallery, panes side by side, or two pictures under a divider. The address says what is shown: #0,1/swipe.

import { Pane, arrange, make } from "./views.js";

const MOST_PANES = 6;
const stage = document.getElementById("stage");
const settings = { linked: true, grid: false, strength: 0.7 };
const chosen = new Set();
let pictures = [], panes = [], leader = null, server = {}, last = [];

const others = {
  lead(pane) { leader = pane; },
  moved(pane) {
    if (settings.linked && pane === leader) for (const other of panes) if (other !== pane) other.follow(pane.bounds());
  },
  point(pane, at) {
    for (const other of panes) other.point(at && (settings.linked || other === pane) ? at : null, other !== pane);
  },
};

function state() {
  const [numbers, mode] = location.hash.slice(1).split("/");
  const given = numbers.split(",").filter((n) => /^\d+$/.test(n) && pictures[n] && !pictures[n].why);
  const shown = given.map(Number).slice(0, MOST_PANES);
  return { shown, mode: shown.length === 0 ? "gallery" : mode === "swipe" && shown.length === 2 ? "swipe" : "side" };
}

function go(shown, mode = "side") {
  location.hash = mode === "gallery" ? "gallery" : shown.join(",") + (mode === "swipe" ? "/swipe" : "");
}

function show() {
  const { shown, mode } = state();
  for (const pane of panes) pane.close();
  panes = [];
  stage.replaceChildren();
  stage.className = mode === "gallery" ? "gallery" : "panes";
  stage.removeAttribute("style");
  if (mode === "gallery") gallery(); else spread(shown.map((n) => pictures[n]), mode);
  controls(shown, mode);
}

function spread(seen, mode) {
  const layout = { ...arrange(seen), pictures: seen };
  const groups = mode === "swipe" ? [seen] : seen.map((picture) => [picture]);
  const columns = groups.length <= 3 ? groups.length : Math.ceil(groups.length / 2);
  stage.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
  panes = groups.map((group) => new Pane(group, layout, settings, others));
  stage.append(...panes.map((pane) => pane.element));
  for (const pane of panes) pane.open(server.tile, server.border);
  leader = panes[0];
  document.title = `${seen.map((picture) => picture.name).join(", ")} · HistoLDM`;
}

function gallery() {
  document.title = "HistoLDM";
  const synthetic = pictures.filter((picture) => picture.synthetic).length;
  const failed = pictures.filter((picture) => picture.why).length;
  const counted = `${pictures.length} pictures, ${synthetic} of them say that they are synthetic`
    + (failed ? `, ${failed} cannot be shown.` : ".");
  stage.append(make("p", { className: "note", textContent: `${counted} Tick two or more to compare them.` }));
  stage.append(...pictures.map((picture) => picture.why ? failure(picture) : card(picture)));
}

function failure(picture) {
  return make("div", { className: "card failed", title: picture.name }, make("p", { textContent: picture.why }),
    make("div", {}, make("b", { textContent: picture.name }), make("small", { textContent: "cannot be shown" })));
}

function card(picture) {
  const box = make("input", { type: "checkbox", ariaLabel: `compare ${picture.name}` });
  box.checked = chosen.has(picture.number);
  box.addEventListener("click", (event) => event.stopPropagation());
  box.addEventListener("change", () => {
    if (box.checked) chosen.add(picture.number); else chosen.delete(picture.number);
    controls([], "gallery");
  });
  const image = make("img", { loading: "lazy", alt: "", src: `${picture.number}/thumbnail.jpg` });
  image.addEventListener("error", async () => {
    const why = await fetch(image.src).then((answer) => answer.text(), () => "cannot be read");
    image.replaceWith(make("p", { textContent: why }));
  });
  const element = make("div", { className: "card", tabIndex: 0, role: "link", title: picture.name }, image, box,
    make("div", {}, make("b", { textContent: picture.name }),
      make("small", { textContent: `${picture.width} × ${picture.height} px` }),
      picture.synthetic ? make("span", { className: "badge", textContent: "SYNTHETIC" }) : null));
  element.addEventListener("click", () => go([picture.number]));
  element.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target === element) go([picture.number]);
  });
  return element;
}

function controls(shown, mode) {
  for (const button of document.querySelectorAll(".modes button")) {
    button.setAttribute("aria-pressed", button.dataset.mode === mode);
  }
  const modes = Object.fromEntries([...document.querySelectorAll(".modes button")].map((b) => [b.dataset.mode, b]));
  modes.gallery.hidden = pictures.length === 1;
  modes.side.disabled = mode === "gallery" && !last.length;
  modes.swipe.disabled = (mode === "gallery" ? last : shown).length !== 2;
  if (mode !== "gallery") last = shown;
  document.querySelector(".tools").hidden = mode === "gallery";
  const compare = document.getElementById("compare");
  compare.hidden = mode !== "gallery" || chosen.size < 2;
  compare.textContent = chosen.size > MOST_PANES ? `Compare the first ${MOST_PANES}` : `Compare ${chosen.size}`;
  document.getElementById("link").hidden = mode === "swipe" || shown.length < 2;
  press("link", settings.linked);
  const known = shown.some((n) => pictures[n].grid || pictures[n].region);
  document.getElementById("grid").hidden = document.getElementById("strength").hidden = !known;
  press("grid", settings.grid);
}

const press = (name, on) => document.getElementById(name).setAttribute("aria-pressed", on);
const active = () => panes.includes(leader) ? leader : panes[0];
const fit = () => { for (const pane of settings.linked ? [active()] : panes) pane?.fit(); };
const redraw = () => { for (const pane of panes) if (pane.ready) pane.draw(); };

function toggle(name, setting) {
  settings[setting] = !settings[setting];
  press(name, settings[setting]);
  if (setting === "linked" && settings.linked && active()?.ready) others.moved(active());
  redraw();
}

function mode(wanted) {
  const { shown } = state();
  go(shown.length ? shown : last, wanted);
}

function step(by) {
  const { shown } = state();
  const good = pictures.filter((picture) => !picture.why).map((picture) => picture.number);
  if (shown.length === 1) go([good[(good.indexOf(shown[0]) + by + good.length) % good.length]]);
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.getElementById("keys").open) return;
  if (event.key === "?") { document.getElementById("keys").showModal(); return; }
  const pane = active();
  if (!pane?.ready || event.target.matches("input")) return;
  const viewport = pane.viewer.viewport, pan = 0.15 * pane.bounds().width;
  const move = (x, y) => viewport.panBy(new OpenSeadragon.Point(x * pan, y * pan));
  const actions = {
    "+": () => viewport.zoomBy(1.4), "=": () => viewport.zoomBy(1.4), "-": () => viewport.zoomBy(1 / 1.4),
    ArrowLeft: () => move(-1, 0), ArrowRight: () => move(1, 0), ArrowUp: () => move(0, -1), ArrowDown: () => move(0, 1),
    0: fit,
    1: () => viewport.zoomTo(pane.pictures[0].width / pane.rects[0].w / viewport.getContainerSize().x),
    l: () => panes.length > 1 && toggle("link", "linked"),
    g: () => toggle("grid", "grid"),
    s: () => state().shown.length === 2 && mode(state().mode === "swipe" ? "side" : "swipe"),
    i: () => pane.tell(pane.pictures[0]),
    n: () => step(1), p: () => step(-1),
    Escape: () => pane.view.querySelector(".about") ? pane.view.querySelector(".about").remove()
      : pictures.length > 1 && mode("gallery"),
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (action) { event.preventDefault(); action(); }
}

async function start() {
  server = await (await fetch("pictures.json")).json();
  pictures = server.pictures.map((picture, number) => ({ ...picture, number }));
  for (const button of document.querySelectorAll(".modes button")) {
    button.addEventListener("click", () => mode(button.dataset.mode));
  }
  document.getElementById("link").addEventListener("click", () => toggle("link", "linked"));
  document.getElementById("grid").addEventListener("click", () => toggle("grid", "grid"));
  document.getElementById("fit").addEventListener("click", fit);
  document.getElementById("help").addEventListener("click", () => document.getElementById("keys").showModal());
  document.getElementById("compare").addEventListener("click", () => go([...chosen].sort((a, b) => a - b)));
  document.querySelector("#strength input").addEventListener("input", (event) => {
    settings.strength = event.target.value / 100;
    redraw();
  });
  window.addEventListener("keydown", key);
  window.addEventListener("hashchange", show);
  window.addEventListener("resize", redraw);
  const named = pictures.filter((picture) => !picture.listed);
  settings.grid = pictures.some((picture) => picture.grid);
  if (location.hash || named.length !== pictures.length || named.length > 4 || named.some((p) => p.why)) show();
  else { history.replaceState(null, "", `#${pictures.map((picture) => picture.number).join(",")}`); show(); }
}

start();
