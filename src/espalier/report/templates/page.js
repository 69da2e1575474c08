// Draws the figures of this page and draws them again when the colour scheme changes.
(() => {
  "use strict";
  const root = document.documentElement;
  const fail = (error) => { root.dataset.error = String(error && error.message || error); };
  window.addEventListener("error", (event) => fail(event.error || event.message));
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touch = window.matchMedia("(pointer: coarse)").matches;

  // "@accent" becomes the value of the style sheet's --accent
  const paint = (value, style) => {
    if (typeof value === "string")
      return value.startsWith("@") ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    if (Array.isArray(value)) return value.map((v) => paint(v, style));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, style)]));
    return value;
  };
  // text of the result never begins with "@" as a colour: only these keys are painted
  const COLOURS = new Set(["color", "fillcolor", "gridcolor", "linecolor", "bgcolor", "bordercolor"]);
  const dress = (value, style) => {
    if (Array.isArray(value)) return value.map((v) => dress(v, style));
    if (value && typeof value === "object")
      return Object.fromEntries(
        Object.entries(value).map(([k, v]) => [k, COLOURS.has(k) ? paint(v, style) : dress(v, style)]));
    return value;
  };

  const draw = (box) => {
    const view = figures[box.dataset.figure][Number(box.dataset.view || 0)];
    const { data, layout } = dress(view.figure, getComputedStyle(root));
    const plot = box.querySelector(".plot");
    // the same revision keeps a reader's zoom when the figure is drawn again for a new width
    const uirevision = box.dataset.view || "0";
    Object.assign(layout, { width: plot.clientWidth, height: plot.clientHeight, uirevision });
    if (touch) layout.dragmode = false;
    return Plotly.react(plot, data, layout, {
      displayModeBar: false, showTips: false,
    });
  };
  const boxes = [...document.querySelectorAll(".figure")];
  let last = Promise.resolve();  // one drawing after the other
  const later = (box) => { last = last.then(() => draw(box)).catch(fail); return last; };
  const all = () => Promise.all(boxes.map(later)).then(() => { root.dataset.drawn = boxes.length; });
  for (const box of boxes)
    for (const button of box.querySelectorAll("button"))
      button.addEventListener("click", () => {
        box.dataset.view = button.dataset.view;
        for (const other of box.querySelectorAll("button"))
          other.setAttribute("aria-pressed", String(other === button));
        later(box);
      });
  const fit = new ResizeObserver((seen) => {
    for (const { target } of seen)
      if (target.layout && Math.abs(target.layout.width - target.clientWidth) > 1)
        later(target.parentElement);
  });
  for (const box of boxes) fit.observe(box.querySelector(".plot"));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  all();
})();
