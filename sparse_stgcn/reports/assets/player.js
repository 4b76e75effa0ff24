"use strict";
// Plays the clips of the page on a canvas. Text from the data reaches the page as text nodes alone.
(() => {
  const element = (id) => document.getElementById(id);
  const canvas = element("canvas");
  if (!canvas) return;
  const clips = JSON.parse(element("clips").textContent);
  const [play, frame, time, speed, yaw, pitch, sample] =
    ["play", "frame", "time", "speed", "yaw", "pitch", "sample"].map(element);
  const context = canvas.getContext("2d");
  const LOST = -32768, LARGEST = 32767, DASHES = [[], [7, 5], [2, 4]], ASIDE = -25, ABOVE = 12;
  let clip, points, shown = 0, started = null; // started: [moment, frame] of the running playback

  // Coordinates in units of the clip's radius; NaN where a joint was lost (see reports/clips.py).
  function unpack(packed) {
    const bytes = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 2 }, (_, i) => {
      const value = view.getInt16(2 * i, true);
      return value === LOST ? NaN : value / LARGEST;
    });
  }

  function select(index) {
    clip = clips[index];
    points = unpack(clip);
    sample.value = index;
    frame.max = clip.shape[0] - 1;
    started = null;
    view();
    describe();
    show(0);
  }

  function view() {
    const flat = clip.shape[3] === 2;
    yaw.value = flat ? 0 : ASIDE;
    pitch.value = flat ? 0 : ABOVE;
  }

  function describe() {
    const right = clip.predictions.length && clip.predictions[0][0] === clip.label;
    element("playing").textContent = `${clip.name}: ${clip.label}. ` + (clip.predictions.length ?
      `Taken for ${clip.predictions[0][0]}, which is ${right ? "right" : "wrong"}. ${clip.why}` : clip.why);
    element("predictions").replaceChildren(...clip.predictions.map(([name, probability]) => {
      const row = document.createElement("tr"), bar = document.createElement("meter");
      bar.value = probability;
      bar.textContent = `${(100 * probability).toFixed(1)} %`;
      for (const content of [name, `${(100 * probability).toFixed(1)} %`, bar]) {
        const cell = document.createElement("td");
        cell.append(content);
        row.append(cell);
      }
      row.children[1].className = "number";
      return row;
    }));
  }

  function show(number) {
    shown = Math.max(0, Math.min(clip.shape[0] - 1, number));
    const said = `${shown + 1} of ${clip.shape[0]}, ${(shown / clip.fps).toFixed(2)} s`;
    frame.value = shown;
    frame.setAttribute("aria-valuetext", said);
    time.textContent = said;
    draw();
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const [, persons, joints, channels] = clip.shape, scale = 0.47 * Math.min(width, height);
    const a = clip.yaw + yaw.value * Math.PI / 180, b = pitch.value * Math.PI / 180;
    const [cy, sy, cp, sp] = [Math.cos(a), Math.sin(a), Math.cos(b), Math.sin(b)];
    const colours = getComputedStyle(canvas);
    const colour = (name) => colours.getPropertyValue(`--${name}`);
    context.lineCap = "round";
    for (let person = 0; person < persons; person++) {
      const flat = []; // x and y of every joint on the canvas (the same rotation as data/clip.py turn)
      for (let joint = 0; joint < joints; joint++) {
        const at = ((shown * persons + person) * joints + joint) * channels;
        const x = points[at], y = points[at + 1], z = channels === 3 ? points[at + 2] : 0 * x;
        const depth = z * cy - x * sy;
        flat.push([width / 2 + scale * (x * cy + z * sy), height / 2 - scale * (y * cp - depth * sp)]);
      }
      context.setLineDash(DASHES[person % DASHES.length]);
      context.lineWidth = 2.5;
      for (const [child, parent] of clip.bones) {
        if (Number.isNaN(flat[child][0]) || Number.isNaN(flat[parent][0])) continue;
        context.strokeStyle = colour(clip.sides[child]);
        context.beginPath();
        context.moveTo(...flat[child]);
        context.lineTo(...flat[parent]);
        context.stroke();
      }
      context.setLineDash([]);
      context.fillStyle = colour("joint");
      for (const [x, y] of flat) {
        if (Number.isNaN(x)) continue;
        context.beginPath();
        context.arc(x, y, 2.5, 0, 2 * Math.PI);
        context.fill();
      }
    }
  }

  function setPlaying(on) {
    if (on && shown === clip.shape[0] - 1) show(0);
    started = on ? [performance.now(), shown] : null;
    play.textContent = on ? "Pause" : "Play";
    play.setAttribute("aria-pressed", String(on));
    if (on) requestAnimationFrame(tick);
  }

  function tick(moment) {
    if (!started) return;
    const next = started[1] + Math.floor(Math.max(0, moment - started[0]) / 1000 * clip.fps * speed.value);
    if (next >= clip.shape[0]) { // round and round
      started = [moment, 0];
      show(0);
    } else if (next !== shown) show(next);
    requestAnimationFrame(tick);
  }

  const turnBy = (input, degrees, wraps) => {
    const value = Number(input.value) + degrees;
    input.value = wraps ? ((value + 540) % 360) - 180 : value;
    draw();
  };
  const step = (by) => { setPlaying(false); show(shown + by); };

  play.addEventListener("click", () => setPlaying(!started));
  frame.addEventListener("input", () => { setPlaying(false); show(Number(frame.value)); });
  speed.addEventListener("change", () => { if (started) started = [performance.now(), shown]; });
  for (const input of [yaw, pitch]) input.addEventListener("input", draw);
  element("reset").addEventListener("click", () => { view(); draw(); });
  sample.addEventListener("change", () => { setPlaying(false); select(Number(sample.value)); });
  canvas.addEventListener("keydown", (event) => {
    const action = { " ": () => setPlaying(!started), ",": () => step(-1), ".": () => step(1),
      ArrowLeft: () => turnBy(yaw, -5, true), ArrowRight: () => turnBy(yaw, 5, true),
      ArrowUp: () => turnBy(pitch, 5, false), ArrowDown: () => turnBy(pitch, -5, false) }[event.key];
    if (action) {
      event.preventDefault();
      action();
    }
  });
  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (!canvas.hasPointerCapture(event.pointerId)) return;
    turnBy(yaw, event.movementX / 2, true);
    turnBy(pitch, event.movementY / 2, false);
  });
  window.addEventListener("resize", draw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  // report.html#sample=3&play opens the fourth sample and plays it.
  const wanted = new URLSearchParams(location.hash.slice(1));
  const first = Number(wanted.get("sample"));
  select(Number.isInteger(first) && first >= 0 && first < clips.length ? first : 0);
  if (wanted.has("play")) setPlaying(true);
})();
