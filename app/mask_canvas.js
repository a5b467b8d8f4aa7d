// A mask painted on an image, place by place, with a mouse, a finger or the keyboard.
//
// data: image (its address), mask (rows of weights from 0 to 1), others (rows painted elsewhere, or
// null), version (another one forgets what was painted here) and label. The state `mask` is
// {version, rows}; it is set when a stroke ends.

const LATER = 350; // milliseconds after the last key before the mask is sent

export default function (component) {
  const { data, parentElement, setStateValue } = component;
  const held = (parentElement.lorgnetteMask ??= begin(parentElement));
  held.send = (value) => setStateValue("mask", value);
  held.show(data);
  return () => {
    held.stop();
    delete parentElement.lorgnetteMask;
  };
}

function begin(parent) {
  const find = (selector) => parent.querySelector(selector);
  const canvas = find("canvas"), said = find(".said"), size = find("input"), pen = canvas.getContext("2d");
  const image = new Image();
  let rows = [[0]], others = null, version = null, past = [], tool = "brush";
  let at = null, cursor = [0, 0], waiting = null, send = () => {};

  const height = () => rows.length, width = () => rows[0].length;
  const copy = () => rows.map((row) => row.slice());

  function paint() {
    const scale = window.devicePixelRatio || 1, shown = canvas.getBoundingClientRect();
    if (!shown.width) return;
    canvas.width = Math.round(shown.width * scale);
    canvas.height = Math.round(shown.height * scale);
    const w = canvas.width / width(), h = canvas.height / height();
    pen.imageSmoothingEnabled = false;
    if (image.naturalWidth) pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    each((y, x) => {
      if (others?.[y]?.[x] > 0) hatch(x * w, y * h, w, h);
      if (rows[y][x] > 0) {
        pen.fillStyle = `rgba(224,63,140,${0.15 + 0.4 * rows[y][x]})`;
        pen.fillRect(x * w, y * h, w, h);
      }
    });
    lines(w, h);
    if (parent.activeElement === canvas || document.activeElement === canvas) {
      pen.strokeStyle = "#fff";
      pen.lineWidth = 3 * scale;
      pen.strokeRect(cursor[1] * w, cursor[0] * h, w, h);
      pen.strokeStyle = "#000";
      pen.lineWidth = scale;
      pen.strokeRect(cursor[1] * w, cursor[0] * h, w, h);
    }
  }

  function each(does) {
    for (let y = 0; y < height(); y++) for (let x = 0; x < width(); x++) does(y, x);
  }

  function lines(w, h) {
    pen.lineWidth = 1;
    for (const colour of ["rgba(0,0,0,.28)", "rgba(255,255,255,.22)"]) {
      pen.strokeStyle = colour;
      pen.beginPath();
      const off = colour.startsWith("rgba(0") ? 0.5 : 1.5;
      for (let x = 1; x < width(); x++) pen.moveTo(x * w + off, 0), pen.lineTo(x * w + off, canvas.height);
      for (let y = 1; y < height(); y++) pen.moveTo(0, y * h + off), pen.lineTo(canvas.width, y * h + off);
      pen.stroke();
    }
  }

  function hatch(left, top, w, h) {
    pen.save();
    pen.beginPath();
    pen.rect(left, top, w, h);
    pen.clip();
    pen.strokeStyle = "rgba(255,255,255,.55)";
    pen.lineWidth = 2;
    for (let x = -h; x < w; x += 9) pen.beginPath(), pen.moveTo(left + x, top + h), pen.lineTo(left + x + h, top), pen.stroke();
    pen.restore();
  }

  // Every place whose middle is within the brush, and the one under the pointer in any case.
  function dab(y, x) {
    const reach = Number(size.value) / 2, value = tool === "brush" ? 1 : 0;
    each((row, column) => {
      const near = Math.hypot(row + 0.5 - y, column + 0.5 - x) <= reach - 0.01;
      if (near || (row === Math.floor(y) && column === Math.floor(x))) rows[row][column] = value;
    });
  }

  function place(event) {
    const shown = canvas.getBoundingClientRect();
    const y = ((event.clientY - shown.top) / shown.height) * height();
    const x = ((event.clientX - shown.left) / shown.width) * width();
    return [Math.min(Math.max(y, 0), height() - 0.001), Math.min(Math.max(x, 0), width() - 0.001)];
  }

  function stroke(from, to) {
    const steps = Math.max(1, Math.ceil(3 * Math.hypot(to[0] - from[0], to[1] - from[1])));
    for (let i = 0; i <= steps; i++) {
      dab(from[0] + ((to[0] - from[0]) * i) / steps, from[1] + ((to[1] - from[1]) * i) / steps);
    }
    paint();
  }

  function tell() {
    let painted = 0;
    each((y, x) => (painted += rows[y][x] > 0));
    said.textContent = `${painted} of ${height() * width()} places painted`;
    find('[data-do="undo"]').disabled = !past.length;
    find('[data-do="clear"]').disabled = !painted;
  }

  function done(later = 0) {
    paint();
    tell();
    clearTimeout(waiting);
    waiting = setTimeout(() => send({ version, rows: copy() }), later);
  }

  function remember() {
    past.push(copy());
    if (past.length > 100) past.shift();
  }

  function undo(later = 0) {
    if (!past.length) return;
    rows = past.pop();
    done(later);
  }

  canvas.onpointerdown = (event) => {
    if (event.button > 0) return;
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    remember();
    at = place(event);
    cursor = at.map(Math.floor);
    stroke(at, at);
  };
  canvas.onpointermove = (event) => {
    if (!at) return;
    const to = place(event);
    stroke(at, to);
    at = to;
  };
  canvas.onpointerup = canvas.onpointercancel = () => {
    if (!at) return;
    at = null;
    done();
  };
  canvas.onkeydown = (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (move) {
      cursor = [(cursor[0] + move[0] + height()) % height(), (cursor[1] + move[1] + width()) % width()];
      const on = rows[cursor[0]][cursor[1]] > 0 ? "painted" : "not painted";
      said.textContent = `Row ${cursor[0]}, column ${cursor[1]}: ${on}`;
      paint();
    } else if (event.key === " " || event.key === "Enter") {
      remember();
      dab(cursor[0] + 0.5, cursor[1] + 0.5);
      done(LATER);
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      undo(LATER);
    } else {
      return;
    }
    event.preventDefault();
  };
  canvas.onfocus = canvas.onblur = paint;
  for (const button of parent.querySelectorAll("[data-tool]")) {
    button.onclick = () => {
      tool = button.dataset.tool;
      for (const one of parent.querySelectorAll("[data-tool]")) one.setAttribute("aria-pressed", one === button);
    };
  }
  find('[data-do="undo"]').onclick = () => undo();
  for (const [name, value] of [["clear", 0], ["fill", 1]]) {
    find(`[data-do="${name}"]`).onclick = () => {
      remember();
      rows = rows.map((row) => row.map(() => value));
      done();
    };
  }
  image.onload = paint;
  const resized = new ResizeObserver(paint);
  resized.observe(canvas);

  return {
    set send(to) { send = to; },
    show(data) {
      if (data.version !== version) {
        version = data.version;
        rows = data.mask.map((row) => row.slice());
        past = [];
        cursor = [0, 0];
      }
      others = data.others;
      canvas.setAttribute("aria-label", data.label);
      canvas.style.aspectRatio = `${data.aspect}`;
      if (image.src !== data.image) image.src = data.image;
      tell();
      paint();
    },
    stop() {
      clearTimeout(waiting);
      resized.disconnect();
    },
  };
}
