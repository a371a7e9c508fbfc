"use strict";
(() => {
  const one = (selector) => document.querySelector(selector);
  const button = one("#theme");
  button.hidden = false;
  button.addEventListener("click", () => {
    const style = document.documentElement.style;
    const dark = style.colorScheme ? style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    style.colorScheme = dark ? "light" : "dark";
  });

  for (const head of document.querySelectorAll("th[data-sort]")) {
    const sorter = document.createElement("button");
    sorter.type = "button";
    sorter.append(...head.childNodes);
    head.append(sorter);
    head.setAttribute("aria-sort", "none");
    sorter.addEventListener("click", () => {
      const sorted = head.getAttribute("aria-sort");
      const down = head.dataset.sort === "text" ? sorted === "ascending" : sorted !== "descending";
      const body = head.closest("table").tBodies[0];
      const key = (row) => row.cells[head.cellIndex].dataset.v ?? row.cells[head.cellIndex].textContent;
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (head.dataset.sort === "text") return x.localeCompare(y, undefined, { numeric: true }) * (down ? -1 : 1);
        return x === "" || y === "" ? (x === "") - (y === "") : (down ? y - x : x - y);
      };
      for (const other of head.parentNode.querySelectorAll("[aria-sort]")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...body.rows].sort(order));
    });
  }

  const chart = one("#run");
  if (!chart) return;
  const data = JSON.parse(one("#run-data").textContent);
  const heat = data.heat;
  const tip = one("#tip");
  const cross = chart.querySelector(".cross");
  const pixels = {};
  for (const kind of heat ? ["absolute", "relative"] : []) {
    const picture = new Image();
    picture.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [picture.width, picture.height];
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(picture, 0, 0);
      pixels[kind] = context.getImageData(0, 0, picture.width, picture.height);
    };
    picture.src = chart.querySelector("image." + kind).getAttribute("href");
  }
  const brief = (value) => String(Number(value.toPrecision(3)));
  const cell = (kind, share, row) => {
    const image = pixels[kind];
    if (!image) return "";
    const at = (row * image.width + Math.min(image.width - 1, Math.floor(share * image.width))) * 4;
    const [red, green, blue, alpha] = image.data.slice(at, at + 4);
    if (!alpha) return "no gradient";
    let [best, least] = [0, Infinity];
    for (let k = 1; k * 6 < heat[kind].length; k++) {
      const part = (n) => parseInt(heat[kind].substr(k * 6 + n * 2, 2), 16);
      const far = (part(0) - red) ** 2 + (part(1) - green) ** 2 + (part(2) - blue) ** 2;
      if (far < least) [best, least] = [k, far];
    }
    if (best < heat.first) return best === 1 ? "zero" : "NaN or inf";
    const level = (best - heat.first) / (heat[kind].length / 6 - heat.first - 1);
    const edge = level === 0 ? "≤ " : level === 1 ? "≥ " : "";
    if (kind === "relative") return `${edge}${brief(10 ** (2 * level - 1))} × its median`;
    return edge + brief(10 ** (heat.low + level * (heat.high - heat.low)));
  };
  let step = 1;
  const show = (row) => {
    const x = data.left + ((step - 0.5) / data.last) * (data.right - data.left);
    const lines = [`step ${step}`];
    for (const [label, points] of data.curves) {
      const near = points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a), points[0]);
      if (near && Math.abs(near[0] - step) <= Math.max(2, data.last / 40)) lines.push(`${label}  ${brief(near[1])}`);
    }
    if (heat && row >= 0 && row < heat.names.length) {
      const kind = one("#relative").checked ? "relative" : "absolute";
      lines.push(`${heat.names[row]}  ${cell(kind, (step - 0.5) / data.last, row)}`);
    }
    cross.setAttribute("transform", `translate(${x} 0)`);
    cross.setAttribute("visibility", "visible");
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    return x;
  };
  const place = (left, top) => {
    const frame = tip.parentNode;
    const room = frame.scrollLeft + frame.clientWidth - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(frame.scrollLeft, left + 16 > room ? left - tip.offsetWidth - 16 : left + 16)}px`;
    tip.style.top = `${top}px`;
  };
  const hide = () => {
    tip.hidden = true;
    cross.setAttribute("visibility", "hidden");
  };
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const zoom = box.width / chart.viewBox.baseVal.width;
    const [x, y] = [(event.clientX - box.left) / zoom, (event.clientY - box.top) / zoom];
    if (x < data.left || x > data.right) return hide();
    step = Math.min(data.last, 1 + Math.floor(((x - data.left) / (data.right - data.left)) * data.last));
    show(heat ? Math.floor((y - heat.top) / heat.row) : -1);
    place(x * zoom, Math.max(0, y * zoom - tip.offsetHeight - 12));
  });
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (!by) return;
    event.preventDefault();
    step = Math.min(data.last, Math.max(1, step + by * Math.max(1, Math.round(data.last / 100))));
    place((show(-1) * chart.getBoundingClientRect().width) / chart.viewBox.baseVal.width, 0);
  });
})();
