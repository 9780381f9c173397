"use strict";
// What every page shares: its data, making elements, colours, the theme and the menu.
// Text from outside is only ever set as text: there is no innerHTML in these scripts.
const data = JSON.parse(document.getElementById("data").textContent);

function element(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function shape(tag, attributes, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function place(name) {
  return document.querySelector(`[data-draw="${name}"]`);
}

function number(value, digits = 2) {
  if (value === null || value === undefined) return "-";
  const text = value.toFixed(digits);
  return Number(text) === 0 ? text.replace("-", "") : text;
}

function signed(value, digits = 2) {
  return value === null || value === undefined ? "-" : (Number(value.toFixed(digits)) > 0 ? "+" : "") + number(value, digits);
}

function significant(value) {
  if (value === null || value === undefined) return "-";
  if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1);
  if (Math.abs(value) >= 10000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function count(value) {
  for (const [unit, name] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= unit) return `${Number((value / unit).toPrecision(3))}${name}`;
  }
  return String(Number(value.toPrecision(3)));
}

// A long name may break after its parts.
function broken(name) {
  return name.split(/(?<=[/_])/).flatMap((part) => [part, element("wbr", {})]);
}

function quantile(sorted, share) {
  const at = (sorted.length - 1) * share, low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function runColor(place) {
  return `--run${place % 8}`;
}

// What is drawn on canvases has to be drawn again in the other colours.
const redraws = [];

(function theme() {
  const button = document.getElementById("theme"), root = document.documentElement;
  const said = { auto: ["Auto", "as the system"], light: ["Light", "light"], dark: ["Dark", "dark"] };
  const order = Object.keys(said);
  let now = "auto";
  function show(next) {
    now = next;
    if (now === "auto") delete root.dataset.theme;
    else root.dataset.theme = now;
    button.textContent = said[now][0];
    button.setAttribute("aria-label", `Colours: ${said[now][1]}`);
    redraws.forEach((draw) => draw());
  }
  button.addEventListener("click", () => show(order[(order.indexOf(now) + 1) % order.length]));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((draw) => draw()));
})();

(function menu() {
  const nav = document.querySelector("nav");
  for (const section of document.querySelectorAll("main > section")) {
    nav.append(element("a", { href: `#${section.id}` }, section.id[0].toUpperCase() + section.id.slice(1)));
  }
})();
