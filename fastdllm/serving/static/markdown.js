// SPDX-License-Identifier: Apache-2.0
// Markdown of an answer as elements. What a model writes only ever becomes text nodes, so nothing of it can be markup.

const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|__([^_\n]+)__|\*([^*\s][^*\n]*)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;

function element(name, ...children) {
  const made = document.createElement(name);
  made.append(...children);
  if (["p", "li", "blockquote"].includes(name) || /^h\d/.test(name)) made.dir = "auto";
  return made;
}

function inline(text) {
  const out = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    out.push(text.slice(from, found.index));
    const [, code, bold, bolder, italic, label, address] = found;
    if (code !== undefined) out.push(element("code", code));
    else if (bold ?? bolder) out.push(element("strong", ...inline(bold ?? bolder)));
    else if (italic) out.push(element("em", ...inline(italic)));
    else {
      const link = element("a", label);
      Object.assign(link, { href: address, rel: "noopener noreferrer nofollow", target: "_blank" });
      out.push(link);
    }
    from = found.index + found[0].length;
  }
  out.push(text.slice(from));
  return out.filter((part) => part !== "");
}

function lines(block) {
  return block.flatMap((line, i) => (i ? [element("br"), ...inline(line)] : inline(line)));
}

const KINDS = [
  ["heading", /^(#{1,6})\s+(.*)$/],
  ["bullet", /^\s*[-*+]\s+(.*)$/],
  ["number", /^\s*(\d+)[.)]\s+(.*)$/],
  ["quote", /^>\s?(.*)$/],
  ["rule", /^\s*(?:-{3,}|\*{3,}|_{3,})\s*$/],
];

function kindOf(line) {
  if (!line.trim()) return ["blank"];
  if (/^\s*(?:-{3,}|\*{3,}|_{3,})\s*$/.test(line)) return ["rule"];
  for (const [kind, pattern] of KINDS) {
    const found = line.match(pattern);
    if (found) return [kind, ...found.slice(1)];
  }
  return ["text"];
}

export function markdown(text) {
  const out = document.createDocumentFragment();
  const all = text.replace(/\r\n?/g, "\n").split("\n");
  for (let i = 0; i < all.length; ) {
    const fence = all[i].match(/^\s*(```+|~~~+)\s*([\w+-]*)/);
    if (fence) {
      const code = [];
      for (i++; i < all.length && !all[i].trim().startsWith(fence[1]); i++) code.push(all[i]);
      i++;
      out.append(element("pre", element("code", code.join("\n"))));
      continue;
    }
    const [kind, ...parts] = kindOf(all[i]);
    if (kind === "blank") i++;
    else if (kind === "rule") out.append(element("hr")), i++;
    else if (kind === "heading") out.append(element(`h${Math.min(6, parts[0].length + 1)}`, ...inline(parts[1]))), i++;
    else {
      const run = [];
      for (; i < all.length && kindOf(all[i])[0] === kind && !/^\s*(```|~~~)/.test(all[i]); i++) run.push(all[i]);
      if (kind === "text") out.append(element("p", ...lines(run)));
      if (kind === "quote") out.append(element("blockquote", ...lines(run.map((line) => kindOf(line)[1]))));
      if (kind === "bullet") out.append(element("ul", ...run.map((line) => element("li", ...inline(kindOf(line)[1])))));
      if (kind === "number") {
        const list = element("ol", ...run.map((line) => element("li", ...inline(kindOf(line)[2]))));
        list.start = Number(parts[0]);
        out.append(list);
      }
    }
  }
  return out;
}
