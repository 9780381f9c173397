"use strict";
// A table of thousands of rows: sorted, filtered and searched as a whole, shown a page at a time, all by keyboard too.

// columns: [{name, label, value(row), cell(row), numeric, wide, head}]; filters: [{name, label, options, holds(row, option)}].
function makeTable(target, { label, rows, columns, filters, sort, text, open, size = 50 }) {
  const state = { sort: sort.column, down: sort.down, page: 0, search: "", chosen: {} };
  const search = element("input", { type: "search", placeholder: "Search", "aria-label": "Search", autocomplete: "off", spellcheck: "false" });
  const selects = filters.map((filter) => element("select", { "aria-label": filter.label, "data-filter": filter.name },
    element("option", { value: "" }, filter.label),
    filter.options.map((option) => element("option", { value: option }, option))));
  const told = element("output", { class: "told", "aria-live": "polite" });
  const head = element("tr", {}), body = element("tbody", {});
  const pager = element("div", { class: "pager" });
  const reset = element("button", { type: "button", class: "quiet" }, "Clear");
  const buttons = new Map();
  for (const column of columns) {
    const button = element("button", { type: "button" }, column.label);
    const cell = element("th", { scope: "col", class: classes(column) }, button, column.head ? column.head() : null);
    button.addEventListener("click", () => {
      state.down = state.sort === column.name ? !state.down : Boolean(column.numeric);
      state.sort = column.name;
      state.page = 0;
      show();
    });
    buttons.set(column.name, cell);
    head.append(cell);
  }
  const haystacks = rows.map((row) => text(row).toLowerCase());
  let found = [];

  function classes(column) {
    return [column.numeric ? "number" : "", column.wide ? "wide" : "", column.kind || ""].join(" ").trim() || null;
  }

  function select() {
    const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
    const active = filters.filter((filter) => state.chosen[filter.name]);
    found = rows.filter((row, i) => words.every((word) => haystacks[i].includes(word))
      && active.every((filter) => filter.holds(row, state.chosen[filter.name])));
    const column = columns.find((each) => each.name === state.sort), way = state.down ? -1 : 1;
    const keyed = found.map((row) => [column.value(row), row]);
    const missing = (value) => value === null || value === undefined;
    keyed.sort(([a, one], [b, other]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b) || one.id.localeCompare(other.id); // always last
      return way * (typeof a === "string" ? a.localeCompare(b) : a - b) || (one.id < other.id ? -1 : 1);
    });
    found = keyed.map(([, row]) => row);
  }

  function show() {
    select();
    for (const [name, cell] of buttons) {
      cell.setAttribute("aria-sort", name !== state.sort ? "none" : state.down ? "descending" : "ascending");
    }
    const pages = Math.max(1, Math.ceil(found.length / size));
    state.page = Math.min(state.page, pages - 1);
    const start = state.page * size, shown = found.slice(start, start + size);
    body.replaceChildren(...shown.map(line));
    if (!found.length) body.append(element("tr", {}, element("td", { colspan: columns.length, class: "nothing" }, "Nothing here: clear the search and the filters.")));
    const range = found.length ? `${(start + 1).toLocaleString("en")} to ${(start + shown.length).toLocaleString("en")} of ` : "";
    told.textContent = `${range}${found.length.toLocaleString("en")}${found.length < rows.length ? ` found among ${rows.length.toLocaleString("en")}` : ""}`;
    reset.hidden = !state.search && !Object.values(state.chosen).some(Boolean);
    page(pages);
  }

  function page(pages) {
    const turn = (step, name, word) => {
      const button = element("button", { type: "button", class: "quiet", "data-turn": name }, word);
      button.disabled = state.page + step < 0 || state.page + step >= pages;
      button.addEventListener("click", () => {
        state.page += step;
        show();
        const again = pager.querySelector(`[data-turn="${name}"]`);
        (again.disabled ? pager.querySelector("button:not(:disabled)") : again)?.focus({ preventScroll: true });
        target.scrollIntoView({ block: "start" });
      });
      return button;
    };
    pager.replaceChildren(...(pages > 1 ? [turn(-1, "back", "← Previous"), element("span", {}, `page ${state.page + 1} of ${pages}`), turn(1, "on", "Next →")] : []));
  }

  function line(row) {
    const made = element("tr", {});
    columns.forEach((column, i) => {
      const content = column.cell(row);
      if (i || !open) return made.append(element("td", { class: classes(column) }, content));
      const toggle = element("button", { type: "button", class: "open", "aria-expanded": "false" }, content);
      toggle.addEventListener("click", () => {
        const opened = toggle.getAttribute("aria-expanded") === "true";
        toggle.setAttribute("aria-expanded", String(!opened));
        if (opened) made.nextSibling.remove();
        else made.after(element("tr", { class: "opened" }, element("td", { colspan: columns.length }, open(row))));
      });
      return made.append(element("th", { scope: "row" }, toggle));
    });
    return made;
  }

  let waiting = 0;
  search.addEventListener("input", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      state.search = search.value;
      state.page = 0;
      show();
    });
  });
  selects.forEach((each, i) => each.addEventListener("change", () => choose(filters[i].name, each.value)));
  reset.addEventListener("click", () => {
    search.value = state.search = "";
    filters.forEach((filter) => choose(filter.name, ""));
    search.focus();
  });

  function choose(name, value) {
    state.chosen[name] = value;
    selects[filters.findIndex((filter) => filter.name === name)].value = value;
    state.page = 0;
    show();
  }

  target.replaceChildren(
    element("div", { class: "controls", role: "search" }, search, selects, reset, told),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
      element("table", {}, element("caption", { class: "hidden" }, label), element("thead", {}, head), body)),
    pager);
  show();
  return { choose };
}
