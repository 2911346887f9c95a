// Panes of deep zoom over pictures that lie in one common frame, so that linked panes share centre and zoom.

const NICE = [1, 2, 5];
const GRID_COLOUR = "28, 78, 216";
const REGION_COLOUR = "196, 88, 0";

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in element && name !== "list") element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/* Where pictures lie beside each other. Those generated for regions of one slide lie where these lie on it; else
   micrometres count, if all pictures know theirs; else each is one unit wide. focus: what is looked at first. */
export function arrange(pictures) {
  const slide = pictures.map((p) => p.region && p.slide).find(
    (name) => name && pictures.filter((p) => p.name === name || (p.region && p.slide === name)).length > 1);
  let rects, focus;
  if (slide) {
    const regions = pictures.filter((p) => p.region && p.slide === slide);
    focus = union(regions.map((p) => box(p.region)));
    rects = pictures.map((p) => p.name === slide ? { x: 0, y: 0, w: p.width, h: p.height }
      : p.region && p.slide === slide ? box(p.region) : { ...focus, h: focus.w * p.height / p.width });
  } else {
    const known = pictures.every((p) => p.mpp);
    rects = pictures.map((p) => known ? { x: 0, y: 0, w: p.width * p.mpp, h: p.height * p.mpp }
      : { x: 0, y: 0, w: 1, h: p.height / p.width });
    focus = union(rects);
  }
  const one = focus.w;
  const place = (r) => ({ x: (r.x - focus.x) / one, y: (r.y - focus.y) / one, w: r.w / one, h: r.h / one });
  return { slide, rects: rects.map(place), focus: place(focus) };
}

const box = ([x, y, w, h]) => ({ x, y, w, h });

function union(rects) {
  const x = Math.min(...rects.map((r) => r.x)), y = Math.min(...rects.map((r) => r.y));
  return { x, y, w: Math.max(...rects.map((r) => r.x + r.w)) - x, h: Math.max(...rects.map((r) => r.y + r.h)) - y };
}

const rectangle = (r) => new OpenSeadragon.Rect(r.x, r.y, r.w, r.h);

function source(picture, tile, border) {
  const maxLevel = Math.ceil(Math.log2(Math.max(picture.width, picture.height)));
  return {
    width: picture.width, height: picture.height, tileSize: tile, tileOverlap: border, maxLevel,
    minLevel: Math.max(0, maxLevel - Math.max(0, Math.ceil(Math.log2(Math.max(picture.width, picture.height) / 256)))),
    getTileUrl: (level, col, row) => `${picture.number}/${level}/${col}_${row}.jpg`,
  };
}

/* One pane: a viewer over one picture, or over two with a divider between them. */
export class Pane {
  constructor(pictures, layout, settings, others) {
    Object.assign(this, { pictures, settings, others, split: 0.5, layout });
    this.rects = pictures.map((p) => layout.rects[layout.pictures.indexOf(p)]);
    this.deep = make("div", { className: "deep" });
    this.overlay = make("canvas", { className: "overlay" });
    this.bar = make("i");
    this.length = make("span");
    this.scale = make("div", { className: "scale" }, this.length, this.bar);
    this.readout = make("div", { className: "readout" });
    this.view = make("div", { className: "view" }, this.deep, this.overlay, this.scale, this.readout);
    this.titles = make("div", { className: "titles" }, ...pictures.map((p, i) => this.title(p, i)));
    this.element = make("section", { className: "pane" }, this.titles, this.view);
    if (pictures.length === 2) this.divide();
  }

  title(picture, index) {
    const size = `${picture.width} × ${picture.height} px` + (picture.mpp ? ` · ${round(picture.mpp)} µm/px` : "");
    const button = make("button", { textContent: "About", title: "What the file says of itself (I)" });
    button.addEventListener("click", () => this.tell(picture));
    return make("div", { className: index ? "title right" : "title", title: picture.name },
      picture.synthetic ? make("span", { className: "badge", textContent: "SYNTHETIC" }) : null,
      make("b", { textContent: picture.name }), make("small", { textContent: size }), button);
  }

  tell(picture) {
    const shown = this.view.querySelector(".about");
    shown?.remove();
    if (shown?.dataset.number === String(picture.number)) return;
    const left = this.pictures.length === 2 && picture === this.pictures[0];
    const about = make("div", { className: left ? "about left" : "about" });
    about.dataset.number = picture.number;
    if (picture.synthetic) {
      about.append(make("p", {}, make("span", { className: "badge", textContent: "SYNTHETIC" }),
        " Generated; not an image of a patient."));
      const list = make("dl");
      for (const [name, value] of Object.entries(picture.synthetic)) {
        if (name === "SYNTHETIC") continue;
        const text = value === null ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value);
        list.append(make("dt", { textContent: name.replaceAll("_", " ") }), make("dd", { textContent: text }));
      }
      about.append(list);
    } else {
      about.append(make("p", { textContent: "The file does not say that it is synthetic." }));
    }
    this.view.append(about);
  }

  open(tile, border) {
    const finest = Math.max(...this.layout.rects.map((r, i) => this.layout.pictures[i].width / r.w));
    this.viewer = OpenSeadragon({
      element: this.deep, drawer: "canvas", showNavigationControl: false, visibilityRatio: 0, animationTime: 0.35,
      springStiffness: 9, zoomPerScroll: 1.35, immediateRender: true, preserveImageSizeOnResize: true,
      minZoomLevel: 0.2 / Math.max(...this.layout.rects.map((r) => r.w)), maxZoomLevel: finest / 40,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      tileSources: this.pictures.map((p, i) => ({
        tileSource: source(p, tile, border), x: this.rects[i].x, y: this.rects[i].y, width: this.rects[i].w,
      })),
    });
    this.viewer.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; });
    this.viewer.addHandler("open", () => {
      const items = this.pictures.map((_, i) => this.viewer.world.getItemAt(i));
      const told = () => { this.element.dataset.loaded = items.every((item) => item.getFullyLoaded()); };
      for (const item of items) item.addHandler("fully-loaded-change", told);
      this.fit(true);
      this.ready = true;
      this.changed();
    });
    for (const name of ["viewport-change", "animation-finish", "resize"]) {
      this.viewer.addHandler(name, () => this.changed());
    }
    for (const name of ["pointerenter", "pointerdown", "wheel"]) {
      this.view.addEventListener(name, () => this.others.lead(this), { capture: true, passive: true });
    }
    this.view.addEventListener("pointermove", (event) => this.hover(event));
    this.view.addEventListener("pointerleave", () => this.others.point(null));
  }

  close() { this.viewer?.destroy(); }

  fit(immediately = false) {
    const own = this.settings.linked || this.pictures.length > 1 ? this.layout.focus : this.rects[0];
    const edge = 0.02 * own.w;
    const around = { x: own.x - edge, y: own.y - edge, w: own.w + 2 * edge, h: own.h + 2 * edge };
    this.viewer.viewport.fitBounds(rectangle(around), immediately);
  }

  bounds() { return this.viewer.viewport.getBounds(true); }

  follow(bounds) {
    if (!this.ready) return;
    this.viewer.viewport.fitBounds(bounds, true);
    this.draw();
  }

  changed() {
    if (!this.ready) return;
    this.draw();
    this.others.moved(this);
  }

  // Screen pixels per unit of the frame
  get unit() { return this.viewer.viewport.getContainerSize().x / this.bounds().width; }

  onScreen(x, y) {
    const bounds = this.bounds();
    return [(x - bounds.x) * this.unit, (y - bounds.y) * this.unit];
  }

  draw() {
    this.drawScale();
    this.drawOverlay();
    if (this.divider) this.clip();
    const bounds = this.bounds();
    this.element.dataset.bounds = [bounds.x, bounds.y, bounds.width].map((value) => value.toFixed(5)).join(" ");
  }

  drawScale() {
    const index = Math.max(0, this.pictures.findIndex((p) => p.mpp));
    const picture = this.pictures[index];
    const own = picture.width / this.rects[index].w / this.unit;  // its px per screen px
    const per = own * (picture.mpp || 1), most = 170 * per;
    const power = 10 ** Math.floor(Math.log10(most));
    const length = Math.max(...NICE.filter((n) => n * power <= most)) * power;
    this.bar.style.width = `${length / per}px`;
    const [count, unit] = !picture.mpp ? [length, "px"] : length >= 1000 ? [length / 1000, "mm"]
      : length < 1 ? [length * 1000, "nm"] : [length, "µm"];
    this.length.textContent = `${round(count)} ${unit}`;
  }

  drawOverlay() {
    const { clientWidth: width, clientHeight: height } = this.view, ratio = window.devicePixelRatio || 1;
    Object.assign(this.overlay, { width: width * ratio, height: height * ratio });
    const pen = this.overlay.getContext("2d");
    pen.scale(ratio, ratio);
    if (this.settings.grid) {
      const split = this.divider ? this.split * width : 0;
      const own = this.pictures.filter((p) => p.grid || p.region);
      const here = this.pictures.some((p) => p.name === this.layout.slide);
      const shown = here ? this.layout.pictures.filter((p) => p.region && p.slide === this.layout.slide) : own;
      for (const picture of new Set([...shown, ...own])) {
        this.drawGrid(pen, picture, this.layout.rects[this.layout.pictures.indexOf(picture)], here && !split);
      }
    }
    if (this.cursor) this.drawCursor(pen);
  }

  drawGrid(pen, picture, rect, named) {
    const strength = this.settings.strength, stroke = (colour, wide) => {
      pen.lineWidth = wide + 2; pen.strokeStyle = `rgba(255, 255, 255, ${strength * 0.6})`; pen.stroke();
      pen.lineWidth = wide; pen.strokeStyle = `rgba(${colour}, ${strength})`; pen.stroke();
    };
    const [x0, y0] = this.onScreen(rect.x, rect.y), [x1, y1] = this.onScreen(rect.x + rect.w, rect.y + rect.h);
    const lines = lattice(picture);
    if (lines) {
      pen.beginPath();
      for (const x of lines.x) { const at = x0 + (x1 - x0) * x; pen.moveTo(at, y0); pen.lineTo(at, y1); }
      for (const y of lines.y) { const at = y0 + (y1 - y0) * y; pen.moveTo(x0, at); pen.lineTo(x1, at); }
      stroke(GRID_COLOUR, 1);
    }
    pen.beginPath();
    pen.rect(x0, y0, x1 - x0, y1 - y0);
    stroke(REGION_COLOUR, 2);
    if (named) {
      const text = picture.name;
      pen.font = "600 12px system-ui, sans-serif";
      pen.fillStyle = `rgba(255, 255, 255, ${strength})`;
      pen.fillRect(x0, y0 - 21, pen.measureText(text).width + 12, 19);
      pen.fillStyle = `rgb(${REGION_COLOUR})`;
      pen.fillText(text, x0 + 6, y0 - 7);
    }
  }

  drawCursor(pen) {
    const [x, y] = this.onScreen(this.cursor.x, this.cursor.y);
    for (const [wide, colour] of [[3, "rgba(255, 255, 255, .8)"], [1, "#111"]]) {
      pen.beginPath();
      pen.moveTo(x - 9, y); pen.lineTo(x + 9, y); pen.moveTo(x, y - 9); pen.lineTo(x, y + 9);
      pen.lineWidth = wide; pen.strokeStyle = colour; pen.stroke();
    }
  }

  hover(event) {
    if (!this.ready) return;
    const corner = this.view.getBoundingClientRect(), bounds = this.bounds();
    const across = event.clientX - corner.left, down = event.clientY - corner.top;
    this.others.point(this, { x: bounds.x + across / this.unit, y: bounds.y + down / this.unit });
  }

  // A point of the frame: said in this pane's own pixels; marked where another pane is pointed at.
  point(at, marked) {
    this.cursor = marked ? at : null;
    const index = this.divider && at && this.onScreen(at.x, at.y)[0] > this.split * this.view.clientWidth ? 1 : 0;
    const picture = this.pictures[index], rect = this.rects[index];
    const x = at && (at.x - rect.x) / rect.w, y = at && (at.y - rect.y) / rect.h;
    if (!at || x < 0 || y < 0 || x >= 1 || y >= 1) { this.readout.textContent = ""; this.drawOverlay(); return; }
    const lines = lattice(picture), count = (edges, value) => edges.filter((edge) => edge <= value).length;
    this.readout.textContent = `x ${Math.floor(x * picture.width)}  y ${Math.floor(y * picture.height)} px`
      + (lines ? `  ·  condition row ${count(lines.y, y)}, column ${count(lines.x, x)}` : "");
    this.drawOverlay();
  }

  divide() {
    this.divider = make("div", { className: "divider", tabIndex: 0, role: "slider", "aria-label": "Divider" });
    this.view.append(this.divider);
    const to = (split) => { this.split = Math.min(1, Math.max(0, split)); this.draw(); };
    this.divider.addEventListener("pointerdown", (event) => this.divider.setPointerCapture(event.pointerId));
    this.divider.addEventListener("pointermove", (event) => {
      const corner = this.view.getBoundingClientRect();
      if (event.buttons) to((event.clientX - corner.left) / corner.width);
    });
    this.divider.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key];
      if (step) { event.preventDefault(); event.stopPropagation(); to(this.split + step); }
    });
  }

  // The second picture is shown right of the divider.
  clip() {
    this.divider.style.left = `${this.split * 100}%`;
    this.divider.setAttribute("aria-valuenow", Math.round(this.split * 100));
    const bounds = this.bounds(), [rect, picture] = [this.rects[1], this.pictures[1]];
    const from = Math.max(0, (bounds.x + this.split * bounds.width - rect.x) / rect.w * picture.width);
    const item = this.viewer.world.getItemAt(1);
    item.setOpacity(from < picture.width ? 1 : 0);
    if (from < picture.width) item.setClip(new OpenSeadragon.Rect(from, 0, picture.width - from, picture.height));
  }
}

/* Inner borders between the cells of a picture's condition grid, as fractions of its sides. */
function lattice(picture) {
  if (!picture.grid || !picture.tile_px) return null;
  const [rows, cols] = picture.grid, between = (count, side) => Array.from({ length: count - 1 }, (_, i) => {
    const pitch = (side - picture.tile_px) / (count - 1);
    return (picture.tile_px / 2 + (i + 0.5) * pitch) / side;
  });
  return { x: between(cols, picture.width), y: between(rows, picture.height) };
}

export const round = (value) => Number(value.toPrecision(4)).toString();
