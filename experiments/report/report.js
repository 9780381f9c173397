"use strict";
// The report of one run, or of several side by side.
(function report() {
  const { runs, enough } = data, several = runs.length > 1;
  const percent = (value) => `${Math.round(100 * value)} %`;
  const named = (i, word) => (several ? `${runs[i].name}${word ? `, ${word}` : ""}` : word);

  // Every environment that any of the runs has, with its places in them.
  const byId = new Map();
  runs.forEach(({ table }, i) => table.id.forEach((id, at) => {
    if (!byId.has(id)) byId.set(id, { id, library: table.library[at], domain: table.domain[at], at: runs.map(() => -1) });
    const row = byId.get(id);
    row.at[i] = at;
    if (row.domain === "unknown") row.domain = table.domain[at];
  }));
  const rows = [...byId.values()];
  const get = (row, name, i = 0) => (row.at[i] < 0 ? null : runs[i].table[name][row.at[i]]);
  const z = (row, i = 0) => get(row, "z", i);
  const last = runs.length - 1;
  const difference = (row, i = last) => (z(row, i) === null || z(row, 0) === null ? null : z(row, i) - z(row, 0));
  const shade = (value, i) => (several ? runColor(i) : value < enough ? "--second" : "--accent");

  function differences() {
    const first = runs[0];
    const lines = runs.slice(1).map((run, k) => {
      const both = rows.map((row) => difference(row, k + 1)).filter((value) => value !== null).sort((a, b) => a - b);
      const told = [["environments in both", both.length.toLocaleString("en")]];
      if (both.length) {
        told.push(["median difference of z", signed(quantile(both, 0.5))],
          ["better by 0.05", both.filter((value) => value > 0.05).length.toLocaleString("en")],
          ["worse by 0.05", both.filter((value) => value < -0.05).length.toLocaleString("en")]);
      }
      told.push([`with z ≥ ${enough}`, signed(run.reaching - first.reaching, 0)], ["matching the reference", signed(run.matches - first.matches, 0)]);
      if (run.iqm && first.iqm) told.push(["interquartile mean", signed(run.iqm.value - first.iqm.value, 3)]);
      const own = [rows.filter((row) => row.at[0] < 0 && row.at[k + 1] >= 0), rows.filter((row) => row.at[k + 1] < 0 && row.at[0] >= 0)];
      told.push(["only in one", `${own[1].length} + ${own[0].length}`]);
      return element("div", {}, element("h3", {}, `${run.name} minus ${first.name}`),
        element("dl", { class: "tiles small" }, told.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)))));
    });
    place("differences").replaceChildren(...lines);
  }

  function curve() {
    const lines = runs.flatMap(({ curve: found, admitted }, i) => {
      const stroke = several ? runColor(i) : "--accent";
      return [
        { name: named(i, several ? "z ≥ τ" : `z ≥ τ, of ${admitted.toLocaleString("en")} admitted`), color: stroke, values: found.share, low: found.low, high: found.high, stepped: true, width: 2.5 },
        { name: named(i, "lower bound"), color: several ? stroke : "--second", values: found.conservative, dash: [5, 4], stepped: true, width: 1.5 },
      ];
    });
    lineChart(place("curve"), {
      label: `Share of admitted environments that reach each threshold: ${runs.map((run) => `${run.reaching} of ${run.admitted} at ${enough}`).join("; ")}`,
      x: { values: runs[0].curve.tau, label: "threshold τ (0 = random, 1 = reference)", range: [0, 1.2], reading: (value) => `τ = ${number(value)}`, incrs: [0.1, 0.2, 0.4] },
      y: { label: "share of admitted", range: [0, 1.03], format: percent, reading: percent },
      lines,
    });
  }

  function groups(choose) {
    const blocks = [["domain", "By domain"], ["library", "By library"]].map(([field, heading]) => {
      const found = new Map();
      for (const row of rows) {
        if (!found.has(row[field])) found.set(row[field], runs.map(() => []));
        runs.forEach((_, i) => { if (z(row, i) !== null) found.get(row[field])[i].push(z(row, i)); });
      }
      const ordered = [...found].filter(([, values]) => values.some((own) => own.length)).sort(([a, one], [b, other]) => other[0].length - one[0].length || a.localeCompare(b));
      const lines = ordered.map(([name, values]) => element("div", { class: "group" },
        element("button", { type: "button", class: "name", title: `Show ${name} in the table`, onclick: () => choose(field, name) }, name),
        element("div", { class: "strips" }, values.map((own, i) => (own.length ? rug(own, several ? runColor(i) : "--accent") : strip()))),
        element("div", { class: "share" }, values.map((own) => element("span", {}, own.length ? percent(own.filter((value) => value >= enough - 1e-6).length / own.length) : "-"))),
        element("div", { class: "of" }, values.map((own) => element("span", {}, own.length.toLocaleString("en"))))));
      const header = element("div", { class: "group head" }, element("span", {}, heading), zScale(), element("span", {}, `z ≥ ${enough}`), element("span", {}, "of"));
      const many = lines.length > 14;
      const rest = many ? element("details", {}, element("summary", {}, `${lines.length - 12} more`), lines.splice(12)) : null;
      return element("div", { class: "groups" }, header, lines, rest);
    });
    place("groups").replaceChildren(...(several ? [key()] : []), ...blocks);
  }

  function key() {
    return element("ul", { class: "legend" }, runs.map((run, i) => element("li", {}, shape("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" },
      shape("line", { x1: 0, x2: 22, y1: 4, y2: 4, style: `stroke: var(${runColor(i)})` })), run.name)));
  }

  function name(row) {
    return [element("span", { class: "id" }, broken(row.id)), element("small", {}, row.domain)];
  }

  function chart(row) {
    const marks = runs.map((_, i) => i).filter((i) => z(row, i) !== null).map((i) => ({ z: z(row, i), low: get(row, "z_low", i), high: get(row, "z_high", i), color: shade(z(row, i), i) }));
    if (marks.length) return interval(marks);
    return element("span", { class: "reason" }, row.at.map((at, i) => (at < 0 ? "" : `refused: ${get(row, "reason", i)}`)).find(Boolean) || "");
  }

  function columns() {
    const value = (label, key, digits, wide = true) => ({ name: key, label, numeric: true, wide, value: (row) => get(row, key), cell: (row) => (digits === undefined ? significant(get(row, key)) : number(get(row, key), digits)) });
    const shared = [{ name: "id", label: "Environment", value: (row) => row.id, cell: name }];
    const picture = { name: "chart", label: "z and its interval", numeric: true, kind: "picture", head: zScale, value: (row) => z(row, last), cell: chart };
    if (!several) {
      return [...shared, value("Random", "random"), value("Reference", "reference"), value("Model", "model"), picture,
        { name: "z", label: "z", numeric: true, value: (row) => z(row), cell: (row) => element("b", {}, number(z(row))) },
        value("First", "z_first_episode", 2)];
    }
    return [...shared, picture,
      ...runs.map((run, i) => ({ name: `z${i}`, label: `z, ${run.name}`, numeric: true, wide: true, value: (row) => z(row, i), cell: (row) => (row.at[i] < 0 ? element("small", {}, "not in it") : number(z(row, i))) })),
      ...runs.slice(1).map((run, k) => ({ name: `difference${k}`, label: runs.length > 2 ? `${run.name}, difference` : "Difference", numeric: true, value: (row) => difference(row, k + 1), cell: (row) => element("b", {}, signed(difference(row, k + 1))) }))];
  }

  function opened(row) {
    return element("div", { class: "sheets" }, runs.map((run, i) => {
      const title = several ? element("h4", {}, run.name) : null;
      if (row.at[i] < 0) return element("div", {}, title, element("p", { class: "note" }, "This run does not have it."));
      const mean = (key) => (get(row, key, i) === null ? "-" : `${significant(get(row, key, i))} ± ${significant(get(row, `${key}_error`, i))}`);
      const told = [["Library", row.library], ["Domain", row.domain], ["Random", mean("random")], ["Reference", mean("reference")], ["Model", mean("model")]];
      const target = get(row, "public_target", i), [random, reference] = [get(row, "random", i), get(row, "reference", i)];
      if (z(row, i) !== null) {
        told.push(["z", `${number(z(row, i))} [${number(get(row, "z_low", i))}, ${number(get(row, "z_high", i))}]`],
          ["By episode", get(row, "by_episode", i).map((each) => number(each)).join(", ") || "-"],
          ["Distance from the reference", `${signed(get(row, "reference_distance", i))} standard deviations`],
          ["Episodes", get(row, "episodes", i).toLocaleString("en")]);
      } else told.push(["Refused", get(row, "reason", i)]);
      if (target !== null) told.push(["Public target", `${significant(target)}${reference !== null && target !== random ? `; the reference comes ${percent((reference - random) / (target - random))} of the way` : ""}`]);
      if (get(row, "other", i)) told.push(["Other decoding", get(row, "other", i)]);
      return element("div", {}, title, element("dl", { class: "details" }, told.flatMap(([term, said]) => [element("dt", {}, term), element("dd", {}, said)])));
    }));
  }

  function table() {
    const distinct = (field) => [...new Set(rows.map((row) => row[field]))].sort((a, b) => a.localeCompare(b));
    const any = (row, holds) => runs.some((_, i) => row.at[i] >= 0 && holds(z(row, i)));
    const outcomes = {
      Admitted: (row) => any(row, (value) => value !== null),
      [`z ≥ ${enough}`]: (row) => any(row, (value) => value !== null && value >= enough - 1e-6),
      [`z < ${enough}`]: (row) => any(row, (value) => value !== null && value < enough - 1e-6),
      "Refused or failed": (row) => any(row, (value) => value === null),
    };
    if (several) {
      runs.forEach((run, i) => { outcomes[`Only in ${run.name}`] = (row) => row.at.every((at, j) => (at >= 0) === (i === j)); });
    }
    return makeTable(place("table"), {
      label: "Environments and their scores",
      rows,
      columns: columns(),
      filters: [
        { name: "domain", label: "All domains", options: distinct("domain"), holds: (row, option) => row.domain === option },
        { name: "library", label: "All libraries", options: distinct("library"), holds: (row, option) => row.library === option },
        { name: "outcome", label: "All outcomes", options: Object.keys(outcomes), holds: (row, option) => outcomes[option](row) },
      ],
      sort: several ? { column: `difference${last - 1}`, down: false } : { column: "z", down: true },
      text: (row) => `${row.id} ${row.domain} ${row.at.map((at, i) => (at < 0 ? "" : get(row, "reason", i))).join(" ")}`,
      open: opened,
    });
  }

  const zTicks = { range: [-0.25, 1.25], ticks: [0, 0.5, 1], format: (value) => String(value) };

  // The same curves of every run, domain by domain, the largest domains first.
  function byDomain(target, curves, y, x, start, end, note) {
    const names = [...new Set(curves.flatMap((found) => Object.keys(found)))];
    const size = (name) => rows.filter((row) => row.domain === name).length;
    const panels = names.sort((a, b) => size(b) - size(a) || a.localeCompare(b)).map((name) => ({
      title: name,
      note: note(name),
      lines: curves.flatMap((found, i) => (found[name] ? [{ color: several ? runColor(i) : "--accent", ...found[name] }] : [])),
    }));
    multiples(target, { x, y, panels, start, end });
  }

  function nothing(target, text) {
    target.replaceChildren(element("p", { class: "note" }, text));
  }

  function context() {
    const target = place("context"), longest = runs.map((run) => run.context.x).sort((a, b) => b.length - a.length)[0];
    if (!longest.length) return nothing(target, "There is nothing to show: no environment has a score.");
    const whole = element("div", { class: "chart" }), parts = element("div", {});
    target.replaceChildren(whole, parts);
    const padded = (values) => longest.map((_, i) => values[i] ?? null);
    lineChart(whole, {
      label: "z from the first episode on a context to the last",
      height: 260,
      x: { values: longest, label: "episode on the same context", range: [0.8, longest.length + 0.2], incrs: [1, 2, 5, 10, 20, 50], reading: (value) => `episode ${value}` },
      y: { label: "z, median", range: (_, low, high) => [Math.min(0, low ?? 0), Math.max(1.05, high ?? 1)], format: (value) => String(Number(value.toFixed(2))), reading: (value) => number(value, 3) },
      lines: runs.flatMap(({ context: found }, i) => (found.all ? [{ name: named(i, several ? "" : "median of all environments"), color: several ? runColor(i) : "--accent", values: padded(found.all.middle), low: padded(found.all.low), high: padded(found.all.high), points: true }] : [])),
    });
    if (longest.length < 2) return nothing(parts, "One episode was played on each context.");
    byDomain(parts, runs.map((run) => lined(run.context.domains)), zTicks, longest, "episode 1", `episode ${longest.length}`, (name) => ends(runs.map((run) => run.context.domains[name]), (found) => found.middle));
  }

  const lined = (domains) => Object.fromEntries(Object.entries(domains).map(([name, found]) => [name, { values: found.middle, low: found.low, high: found.high }]));
  const ends = (all, values) => all.filter(Boolean).map((found) => {
    const seen = values(found).filter((value) => value !== null);
    return `${number(seen[0])} → ${number(seen[seen.length - 1])}`;
  }).join(" | ");

  function training() {
    const xs = [...new Set(runs.flatMap((run) => run.training.x))].sort((a, b) => a - b);
    if (!xs.length) return;
    const aligned = ({ training: found }, values) => {
      const at = new Map(found.x.map((x, i) => [x, values[i]]));
      return xs.map((x) => at.get(x) ?? null);
    };
    const positive = (values) => values.map((value) => (value !== null && value > 0 ? value : null));
    const lines = runs.flatMap((run, i) => {
      const stroke = several ? runColor(i) : "--accent", found = run.training;
      const shown = [{ name: named(i, "excess loss"), color: stroke, values: positive(aligned(run, found.kl)) }];
      if (!several) shown.push({ name: "loss", color: "--muted", values: positive(aligned(run, found.loss)) });
      if (found.held.some((value) => value !== null)) shown.push({ name: named(i, "excess loss, held out"), color: several ? stroke : "--second", values: positive(aligned(run, found.held)), dash: [5, 4] });
      return shown;
    }).filter((line) => line.values.some((value) => value !== null));
    if (!lines.length) return nothing(place("training"), "No losses were written down.");
    lineChart(place("training"), {
      label: "Losses of the pretraining against tokens",
      height: 300,
      x: { values: xs, label: "tokens, one a time step", format: count, reading: (value) => `${count(value)} tokens` },
      y: { label: "nats a slot", log: true, range: (_, low, high) => [low * 0.8, high * 1.25], format: count, reading: significant },
      lines,
    });
    const seen = runs.flatMap((run) => Object.values(run.training.domains).flat()).filter((value) => value !== null && value > 0);
    if (!seen.length) return;
    const low = Math.max(-4, Math.floor(Math.log10(Math.min(...seen)))), high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...seen))));
    const decades = Array.from({ length: high - low + 1 }, (_, i) => Number(`1e${low + i}`));
    const ticks = decades.length > 4 ? decades.filter((_, i) => i % 2 === 0) : decades;
    const target = place("domains"), parts = element("div", {});
    target.replaceChildren(element("h3", {}, "Excess loss by domain"), element("p", { class: "note" }, "Nats an action slot, on a logarithmic scale."), parts);
    byDomain(parts, runs.map((run) => Object.fromEntries(Object.entries(run.training.domains).map(([name, values]) => [name, { values: aligned(run, values) }]))),
      { log: true, range: [10 ** low, 10 ** high], ticks, format: (value) => (value < 1e-3 ? value.toExponential(0) : String(value)) }, xs, "0", `${count(xs[xs.length - 1])} tokens`,
      (name) => runs.map((run) => run.training.domains[name]).filter(Boolean).map((values) => `${significant(values.filter((value) => value !== null).pop() ?? null)} at the end`).join(" | "));
  }

  function references() {
    const target = place("references"), longest = runs.map((run) => run.references.x).find((x) => x.length) || [];
    if (!runs.some((run) => Object.keys(run.references.domains).length)) return nothing(target, "No curve of a reference is there.");
    byDomain(target, runs.map((run) => lined(run.references.domains)), zTicks, longest, "start", "end of training",
      (name) => runs.map((run) => run.references.domains[name]).filter(Boolean).map((found) => `${found.count} reference${found.count === 1 ? "" : "s"}`).join(" | "));
  }

  differencesIfSeveral();
  curve();
  const made = table();
  groups((field, value) => {
    made.choose(field, value);
    document.getElementById("environments").scrollIntoView();
  });
  context();
  training();
  references();
  rollouts(place("rollouts"), runs, (id, i) => number(z(byId.get(id) || { at: runs.map(() => -1) }, i)));

  function differencesIfSeveral() {
    if (several) differences();
  }
})();
