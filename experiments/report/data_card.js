"use strict";
// The card of a dataset.
(function card() {
  const rows = data.id.map((id, i) => ({ id, i, domain: data.domain[i], z: data.z[i] }));
  const get = (row, name) => data[name][row.i];
  const whole = (value) => (value === null ? "-" : value.toLocaleString("en"));

  const made = makeTable(place("table"), {
    label: "Environments of the dataset",
    rows,
    columns: [
      { name: "id", label: "Environment", value: (row) => row.id, cell: (row) => [element("span", { class: "id" }, broken(row.id)), element("small", {}, row.domain)] },
      { name: "transitions", label: "Transitions", numeric: true, wide: true, value: (row) => get(row, "transitions"), cell: (row) => whole(get(row, "transitions")) },
      { name: "raw", label: "Bytes", numeric: true, wide: true, value: (row) => get(row, "raw"), cell: (row) => significant(get(row, "raw")) },
      { name: "stored", label: "Stored", numeric: true, wide: true, value: (row) => get(row, "stored"), cell: (row) => significant(get(row, "stored")) },
      { name: "chart", label: "Returns of episodes, as z", numeric: true, kind: "picture", head: zScale, value: (row) => row.z[1],
        cell: (row) => (row.z[1] === null ? element("span", { class: "reason" }, "no episode ended") : interval([{ low: row.z[0], z: row.z[1], high: row.z[2], color: "--accent" }])) },
      { name: "z", label: "Median", numeric: true, value: (row) => row.z[1], cell: (row) => element("b", {}, number(row.z[1])) },
      { name: "labels", label: "Labels", numeric: true, wide: true, value: (row) => get(row, "labels"), cell: (row) => `${significant(100 * get(row, "labels"))} %` },
    ],
    filters: [
      { name: "domain", label: "All domains", options: [...new Set(data.domain)].sort(), holds: (row, option) => row.domain === option },
      { name: "by", label: "All references", options: [...new Set(data.by)].sort(), holds: (row, option) => get(row, "by") === option },
    ],
    sort: { column: "id", down: false },
    text: (row) => `${row.id} ${row.domain} ${get(row, "by")}`,
    open: (row) => {
      const noise = get(row, "noise");
      const told = [["Domain", row.domain], ["Transitions", whole(get(row, "transitions"))], ["Bytes a transition", `${significant(get(row, "raw"))} in memory, ${significant(get(row, "stored"))} stored`],
        ["Episodes that ended", whole(get(row, "episodes"))], ["Random policy", significant(get(row, "random"))], ["Reference", significant(get(row, "reference"))],
        ["Median of episodes", significant(get(row, "median"))], ["Noise", noise.length ? `${number(noise[0])} to ${number(noise[1])}` : "-"], ["Labels by", get(row, "by")]];
      return element("dl", { class: "details" }, told.flatMap(([term, said]) => [element("dt", {}, term), element("dd", {}, said)]));
    },
  });

  function groups() {
    const found = new Map();
    for (const row of rows) found.set(row.domain, [...(found.get(row.domain) || []), row]);
    const total = rows.reduce((sum, row) => sum + get(row, "transitions"), 0) || 1;
    const sum = (members) => members.reduce((all, row) => all + get(row, "transitions"), 0);
    const lines = [...found].sort(([, one], [, other]) => sum(other) - sum(one)).map(([domain, members]) => {
      const z = members.map((row) => row.z[1]).filter((value) => value !== null);
      return element("div", { class: "group" },
        element("button", { type: "button", class: "name", title: `Show ${domain} in the table`, onclick: () => {
          made.choose("domain", domain);
          document.getElementById("environments").scrollIntoView();
        } }, domain),
        z.length ? rug(z, "--accent") : strip(),
        element("div", { class: "share" }, `${number(100 * sum(members) / total, 1)} %`),
        element("div", { class: "of" }, whole(members.length)));
    });
    const head = element("div", { class: "group head" }, element("span", {}, ""), zScale(), element("span", {}, "of steps"), element("span", {}, "ids"));
    const rest = lines.length > 24 ? element("details", {}, element("summary", {}, `${lines.length - 20} more`), lines.splice(20)) : null;
    place("groups").replaceChildren(element("div", { class: "groups" }, head, lines, rest));
  }

  groups();
  const levels = data.levels;
  if (rows.length) lineChart(place("noise"), {
    label: "Share of episodes and median z against the level of noise",
    height: 280,
    x: { values: levels.x, label: "noise of the episode", range: [0, 1], incrs: [0.1, 0.2, 0.5], reading: (value) => `noise ${number(value)}` },
    y: { label: "z, and share of episodes", range: (_, low, high) => [Math.min(0, low ?? 0), Math.max(1.05, high ?? 1)], format: (value) => String(Number(value.toFixed(2))) },
    lines: [
      { name: "z, median of environments", color: "--accent", values: levels.middle, low: levels.low, high: levels.high, points: true },
      { name: "share of episodes", color: "--second", values: levels.share, bars: true },
    ],
  });
})();
