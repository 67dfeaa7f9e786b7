"use strict";
// Shows a chart's values at the x nearest to the pointer.
(() => {
  const tip = document.getElementById("tip");

  function show(svg, data, event) {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const pointer = (event.clientX - box.left) * scale;
    let nearest = 0;
    data.at.forEach((at, index) => {
      if (Math.abs(at - pointer) < Math.abs(data.at[nearest] - pointer)) nearest = index;
    });
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("x1", data.at[nearest]);
    cursor.setAttribute("x2", data.at[nearest]);
    cursor.classList.add("on");
    tip.replaceChildren(row("", `${data.label} ${data.x[nearest]}`, ""));
    for (const line of data.lines) {
      if (line.y[nearest] !== null) tip.append(row(`swatch c${line.colour}`, line.name, line.y[nearest]));
    }
    tip.hidden = false;
    const right = event.clientX + 14 + tip.offsetWidth > document.documentElement.clientWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX - tip.offsetWidth - 14 : event.clientX + 14)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  }

  function row(swatch, name, value) {
    const line = document.createElement("div");
    if (swatch) line.append(Object.assign(document.createElement("i"), { className: swatch }));
    line.append(Object.assign(document.createElement("span"), { textContent: name }));
    line.append(Object.assign(document.createElement("b"), { textContent: value }));
    return line;
  }

  function hide(svg) {
    tip.hidden = true;
    svg.querySelector(".cursor").classList.remove("on");
  }

  for (const svg of document.querySelectorAll("svg[data-hover]")) {
    const data = JSON.parse(svg.dataset.hover);
    svg.addEventListener("pointermove", (event) => show(svg, data, event));
    svg.addEventListener("pointerdown", (event) => show(svg, data, event));
    svg.addEventListener("pointerleave", () => hide(svg));
  }
})();
