// SPDX-License-Identifier: Apache-2.0
// Icons as drawings, so that none depends on a font. Strokes on a square of 24.

const PATHS = {
  play: "M8 5.5v13l11-6.5z",
  pause: "M8 5v14M16 5v14",
  stop: "M7 7h10v10H7z",
  send: "M12 19V5M6 11l6-6 6 6",
  settings: "M4 7h9M17 7h3M4 17h3M11 17h9M15 4.5v5M9 14.5v5",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M18.7 5.3l-1.4 1.4M6.7 17.3l-1.4 1.4",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  link: "M10 14a4 4 0 0 0 6 .4l3-3a4 4 0 0 0-5.700-5.700l-1 1M14 10a4 4 0 0 0-6-.4l-3 3a4 4 0 0 0 5.700 5.700l1-1",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  check: "M5 12.500l4.500 4.500L19 7.500",
  download: "M12 4v11M7 10.500l5 5 5-5M5 20h14",
  retry: "M20 12a8 8 0 1 1-2.400-5.700M20 3.500V7.500h-4",
  edit: "M4 20l1-4L16.500 4.500l3 3L8 19zM14 7l3 3",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
};

export function icon(name) {
  const drawing = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  drawing.setAttribute("viewBox", "0 0 24 24");
  drawing.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  drawing.append(path);
  return drawing;
}

// A button that shows an icon and says in words what it does.
export function iconButton(name, label, act) {
  const button = document.createElement("button");
  Object.assign(button, { type: "button", className: "icon" });
  button.setAttribute("aria-label", label);
  button.dataset.tip = label;
  button.append(icon(name));
  button.addEventListener("click", () => act(button));
  return button;
}

// For a moment the button shows that it has worked.
export function confirm(button, name) {
  button.replaceChildren(icon("check"));
  setTimeout(() => button.replaceChildren(icon(name)), 1200);
}
