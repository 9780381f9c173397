"use strict";
// A few recordings, drawn on canvases that only move while they are in sight.
function rollouts(target, runs, score) {
  const recordings = runs.flatMap((run, i) => run.rollouts.map((recording) => ({ ...recording, run: i })));
  if (!recordings.length) {
    target.replaceChildren(element("p", { class: "note" }, "None was recorded."));
    return;
  }
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let playing = !still, clock = 0, before = 0;
  const button = element("button", { type: "button", class: "quiet" }, playing ? "Pause" : "Play");
  const speed = 12; // steps a second
  const shown = [];
  const grid = element("div", { class: "rollouts" }, recordings.map((recording) => {
    const canvas = element("canvas", { width: 280, height: 280, role: "img", "aria-label": `A rollout in ${recording.id}` });
    const told = element("span", { class: "told" });
    const kind = { pictures: "what it sees", cells: "a cell a state", lines: "" }[recording.kind];
    const caption = recording.kind === "lines" ? `${recording.names[recording.axes[0]]} across, ${recording.names[recording.axes[1]]} up` : kind;
    const z = score(recording.id, recording.run);
    const figure = element("figure", {}, canvas, element("figcaption", {},
      element("b", {}, broken(recording.id)), element("span", {}, `${runs.length > 1 ? `${runs[recording.run].name}, ` : ""}z ${z}${caption ? ` · ${caption}` : ""}`), told));
    const player = { canvas, told, recording, draw: painter(recording, () => paint()), visible: true };
    shown.push(player);
    new IntersectionObserver((entries) => {
      player.visible = entries[0].isIntersecting;
      if (!playing) paint();
    }).observe(canvas);
    return figure;
  }));
  button.addEventListener("click", () => {
    playing = !playing;
    button.textContent = playing ? "Pause" : "Play";
    if (playing) requestAnimationFrame(tick);
  });
  target.replaceChildren(element("div", { class: "controls" }, button), grid);

  function paint() {
    for (const { canvas, told, recording, draw, visible } of shown) {
      if (!visible) continue;
      const steps = recording.rewards.length, t = Math.floor(clock * speed) % steps;
      let total = 0;
      for (let s = 0; s <= t; s++) total = recording.first[s] ? 0 : total + recording.rewards[s];
      draw(canvas.getContext("2d"), t);
      told.textContent = `step ${t}, return ${significant(total)}`;
    }
  }

  function tick(now) {
    if (!playing) return;
    if (now - before > 1000 / speed) {
      clock += Math.min(0.2, (now - before) / 1000);
      before = now;
      paint();
    }
    requestAnimationFrame(tick);
  }
  redraws.push(paint);
  paint();
  if (playing) requestAnimationFrame(tick);
}

function painter(recording, loaded) {
  return { pictures: paintPictures, cells: paintCells, lines: paintLines }[recording.kind](recording, loaded);
}

function paintPictures({ source, width, height, columns, count: frames, sharp }, loaded) {
  const sheet = new Image();
  sheet.addEventListener("load", loaded);
  sheet.src = source;
  return (pen, t) => {
    if (!sheet.complete || !sheet.naturalWidth) return;
    const at = Math.min(t, frames - 1), side = pen.canvas.width, scale = Math.min(side / width, side / height);
    pen.clearRect(0, 0, side, side);
    pen.imageSmoothingEnabled = !sharp;
    pen.drawImage(sheet, (at % columns) * width, Math.floor(at / columns) * height, width, height,
      (side - scale * width) / 2, (side - scale * height) / 2, scale * width, scale * height);
  };
}

function paintCells({ count: cells, states }) {
  const columns = Math.ceil(Math.sqrt(cells)), rows = Math.ceil(cells / columns);
  return (pen, t) => {
    const side = pen.canvas.width, cell = side / Math.max(columns, rows), gap = cell > 8 ? 1.5 : 0.5;
    const left = (side - columns * cell) / 2, top = (side - rows * cell) / 2;
    const visits = new Map();
    for (let s = Math.max(0, t - 30); s <= t; s++) visits.set(states[s], s);
    pen.clearRect(0, 0, side, side);
    for (let i = 0; i < cells; i++) {
      pen.globalAlpha = visits.has(i) ? Math.max(0.15, 1 - (t - visits.get(i)) / 30) : 1;
      pen.fillStyle = color(i === states[t] ? "--second" : visits.has(i) ? "--accent" : "--grid");
      pen.fillRect(left + (i % columns) * cell + gap, top + Math.floor(i / columns) * cell + gap, cell - 2 * gap, cell - 2 * gap);
    }
    pen.globalAlpha = 1;
  };
}

function paintLines({ values, names, axes, rewards, first }) {
  const bytes = Uint8Array.from(atob(values), (letter) => letter.charCodeAt(0)), width = names.length;
  const at = (t, i) => bytes[t * width + i] / 255;
  return (pen, t) => {
    const side = pen.canvas.width, band = 64, room = side - band - 12, pad = 12;
    const spot = (s) => [pad + at(s, axes[0]) * (side - 2 * pad), room - pad - at(s, axes[1]) * (room - 2 * pad)];
    pen.clearRect(0, 0, side, side);
    pen.lineCap = "round";
    pen.strokeStyle = color("--accent");
    for (let s = Math.max(1, t - 60); s <= t; s++) {
      if (first[s]) continue;
      pen.globalAlpha = Math.max(0.06, 1 - (t - s) / 60);
      pen.lineWidth = 2.5;
      pen.beginPath();
      pen.moveTo(...spot(s - 1));
      pen.lineTo(...spot(s));
      pen.stroke();
    }
    pen.globalAlpha = 1;
    pen.fillStyle = color("--second");
    pen.beginPath();
    pen.arc(...spot(t), 5.5, 0, 7);
    pen.fill();
    // Below it all numbers against time, a row each.
    const height = band / width, step = side / rewards.length;
    pen.fillStyle = color("--accent");
    for (let i = 0; i < width; i++) {
      for (let s = 0; s < rewards.length; s++) {
        pen.globalAlpha = (s <= t ? 1 : 0.25) * (0.08 + 0.92 * at(s, i));
        pen.fillRect(s * step, side - band + i * height, step + 0.5, Math.max(1, height - 1));
      }
    }
    pen.globalAlpha = 1;
    pen.fillStyle = color("--second");
    pen.fillRect(t * step, side - band - 3, 2, band + 3);
  };
}
