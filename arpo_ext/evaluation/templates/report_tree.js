// The tree viewer. Whatever a tree holds becomes text nodes, never markup.
(() => {
  const viewer = document.getElementById("viewer");
  if (!viewer) return;
  const sources = [...document.querySelectorAll("script.tree")];
  const trees = sources.map((source) => JSON.parse(source.textContent));
  const darkest = Number(viewer.dataset.shade);
  const part = (name) => document.getElementById(`tree-${name}`);
  const MAP = { lane: 24, prompt: 54, left: 2, reward: 120, width: 1100 };

  function element(tag, className, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...children.filter((child) => child !== null && child !== ""));
    return node;
  }

  function shape(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  const fixed = (value, digits = 3) => (value === null ? "-" : value.toFixed(digits));
  const signed = (value) => (value === null ? "-" : (value > 0 ? "+" : "") + value.toFixed(3));
  const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

  function shade(segment) {
    if (!segment.sampled || segment.mean === null) return "";
    return `rgb(var(--heat) / ${(0.04 + 0.5 * Math.min(1, segment.mean / darkest)).toFixed(3)})`;
  }

  function childrenOf(tree) {
    const children = tree.segments.map(() => []);
    tree.segments.forEach((segment, index) => {
      if (segment.parent >= 0) children[segment.parent].push(index);
    });
    return children;
  }

  function pathOf(tree, segment) {
    const path = new Set();
    for (let at = segment; at >= 0; at = tree.segments[at].parent) path.add(at);
    return path;
  }

  // Facts above the tree.
  function facts(tree) {
    const line = (name, value) => element("div", "", element("dt", "", name), element("dd", "", value));
    const counts = tree.counts;
    return element(
      "dl",
      "facts",
      line("Question", tree.prompt),
      line("Accepted answers", tree.answers.join("  |  ") || "-"),
      line(
        "Tree",
        `${plural(tree.leaves.length, "path")}, ${plural(counts.forks, "fork")}, ${plural(counts.tool_calls, "tool call")}, ` +
          `${counts.sampled_tokens} sampled tokens; policy ${tree.policy}, seed ${tree.seed}`,
      ),
    );
  }

  // The map: one lane a path, time to the right; a shared segment spans the lanes of all its paths.
  function lanes(tree, children) {
    const places = tree.segments.map(() => ({ first: 0, count: 0 }));
    const rows = [];
    (function visit(index) {
      const first = rows.length;
      tree.leaves.forEach((leaf, number) => leaf.segment === index && rows.push(number));
      children[index].forEach(visit);
      places[index] = { first, count: Math.max(1, rows.length - first) };
    })(0);
    return { places, rows };
  }

  function map(tree, children, choose) {
    const { places, rows } = lanes(tree, children);
    const start = tree.segments.map(() => 0);
    tree.segments.forEach((segment, index) => {
      if (segment.parent >= 0) start[index] = start[segment.parent] + (segment.parent ? tree.segments[segment.parent].tokens : 0);
    });
    const longest = Math.max(1, ...tree.segments.map((segment, index) => (index ? start[index] + segment.tokens : 0)));
    const scale = (MAP.width - MAP.prompt - MAP.reward) / longest;
    const x = (tokens) => MAP.left + MAP.prompt + tokens * scale;
    const height = Math.max(1, rows.length) * MAP.lane;
    const svg = shape("svg", { viewBox: `0 0 ${MAP.width} ${height + 22}`, role: "img" });
    tree.segments.forEach((segment, index) => {
      const left = index ? x(start[index]) : MAP.left;
      const width = index ? Math.max(2, segment.tokens * scale) : MAP.prompt;
      svg.append(block(segment, index, { left, width, ...places[index] }, choose));
    });
    rows.forEach((number, row) => {
      const leaf = tree.leaves[number];
      const end = x(leaf.segment ? start[leaf.segment] + tree.segments[leaf.segment].tokens : 0) + 6;
      const text = `${mark(leaf)} ${fixed(leaf.reward, 2)}  path ${number + 1}`;
      const label = shape("text", { x: end, y: row * MAP.lane + 16, class: "lane" }, text);
      label.addEventListener("click", () => choose(number));
      svg.append(label);
    });
    svg.append(shape("text", { x: MAP.left + MAP.prompt, y: height + 16, class: "axis" }, "0"));
    const end = { x: x(longest), y: height + 16, class: "axis", "text-anchor": "end" };
    svg.append(shape("text", end, `${longest} tokens after the prompt`));
    return svg;
  }

  function block(segment, index, place, choose) {
    const box = {
      x: place.left + 1,
      y: place.first * MAP.lane + 1,
      width: Math.max(1, place.width - 2),
      height: place.count * MAP.lane - 2,
      rx: 3,
    };
    const kind = index === 0 ? "prompt" : segment.tool ? "tool" : "model";
    const rectangle = shape("rect", { ...box, class: `${kind} ${segment.tool && !segment.tool.ok ? "failed" : ""}` });
    if (shade(segment)) rectangle.style.fill = shade(segment);
    const name = index === 0 ? "prompt" : segment.tool ? segment.tool.name : "";
    const group = shape("g", { class: "block" }, rectangle, shape("title", {}, title(segment, index)));
    if (name && place.width > name.length * 6 + 4) {
      const at = { x: box.x + box.width / 2, y: box.y + box.height / 2 + 4, "text-anchor": "middle" };
      group.append(shape("text", at, name));
    }
    group.addEventListener("click", () => reveal(index));
    return group;
  }

  function title(segment, index) {
    const kind = index === 0 ? "prompt" : segment.tool ? `result of ${segment.tool.name}` : "model";
    const entropy = segment.mean === null ? "" : `, mean entropy ${fixed(segment.mean)} nats`;
    return `segment ${index}: ${kind}, ${plural(segment.tokens, "token")}${entropy}`;
  }

  function reveal(index) {
    const card = document.getElementById(`segment-${index}`);
    if (!card) return;
    card.scrollIntoView({ behavior: "smooth", block: "center" });
    card.classList.add("found");
    setTimeout(() => card.classList.remove("found"), 1600);
  }

  const mark = (leaf) => (leaf.accuracy === null ? "•" : leaf.accuracy >= 0.999 ? "✓" : leaf.accuracy > 0 ? "~" : "✗");

  // The body: every segment once, indented where paths part.
  function strip(segment) {
    if (!segment.bars.length) return null;
    const height = 26;
    const top = Math.max(darkest, ...segment.bars.map((value) => value ?? 0));
    const pitch = segment.bars.length > 80 ? 4 : 7;
    const width = segment.bars.length * pitch;
    const svg = shape("svg", { class: "strip", width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
    svg.append(shape("title", {}, "Entropy of each token"));
    segment.bars.forEach((value, index) => {
      const tall = value === null ? 0 : Math.max(1, (value / top) * height);
      const bar = shape("rect", { x: index * pitch, y: height - tall, width: pitch - 1, height: tall });
      const first = index * segment.per_bar + 1;
      const span = segment.per_bar === 1 ? `token ${first}` : `tokens ${first} to ${first + segment.per_bar - 1}, mean`;
      const target = shape("rect", { x: index * pitch, y: 0, width: pitch, height, class: "target" });
      svg.append(bar, shape("g", {}, target, shape("title", {}, `${span}: ${fixed(value)} nats`)));
    });
    return element("div", "strip-row", svg);
  }

  const badge = (text, className = "") => element("span", `badge ${className}`, text);

  function heading(segment, index) {
    const { tool, branch } = segment;
    const line = element("div", "heading", element("b", "", index === 0 ? "Prompt" : tool ? `Result of ${tool.name}` : "Model"));
    line.append(badge(plural(segment.tokens, "token")));
    if (tool) {
      line.append(badge(tool.ok ? "ok" : "failed", tool.ok ? "good" : "bad"));
      line.append(badge(tool.cached ? "from cache" : `${fixed(tool.seconds)} s`));
    }
    if (segment.sampled) line.append(badge(segment.mean === null ? "entropy not kept" : `mean entropy ${fixed(segment.mean)} nats`));
    if (segment.probe !== null) line.append(badge(`probe ${fixed(segment.probe)}`));
    if (branch) {
      const outcome = branch.children ? `forked ${plural(branch.children, "sibling")}` : "no fork";
      const text = `${outcome}: score ${fixed(branch.score)}, room ${branch.room}`;
      line.append(badge(text, branch.children ? "fork" : ""));
    }
    return line;
  }

  function card(tree, index) {
    const segment = tree.segments[index];
    const kind = index === 0 ? "prompt" : segment.tool ? "tool" : "model";
    const box = element("article", `segment ${kind}`, heading(segment, index));
    box.id = `segment-${index}`;
    box.dataset.segment = index;
    box.style.background = shade(segment);
    box.append(element("pre", "", segment.text || "(no text)"));
    const bars = strip(segment);
    if (bars) box.append(bars);
    tree.leaves.forEach((leaf, number) => leaf.segment === index && box.append(leafLine(leaf, number)));
    return box;
  }

  function leafLine(leaf, number) {
    const line = element("div", "leaf", element("b", "", `${mark(leaf)} Path ${number + 1}`));
    line.append(badge(`reward ${fixed(leaf.reward)}`), badge(`accuracy ${fixed(leaf.accuracy)}`));
    line.append(badge(`advantage ${signed(leaf.advantage)}`, leaf.advantage > 0 ? "good" : leaf.advantage < 0 ? "bad" : ""));
    line.append(badge(`ended by ${leaf.end}`));
    return line;
  }

  function grow(tree, children, index, into) {
    into.append(card(tree, index));
    const below = children[index];
    if (below.length === 1) return grow(tree, children, below[0], into);
    below.forEach((child, number) => {
      const lane = element("div", "branch", element("p", "part", `${number + 1} of ${below.length} from here`));
      lane.dataset.segment = child;
      grow(tree, children, child, lane);
      into.append(lane);
    });
  }

  // Choosing a tree and a path of it.
  const label = (tree) => (tree.step === null ? "no step" : String(tree.step));
  let current = 0;

  function options(select, entries, chosen) {
    select.replaceChildren(
      ...entries.map(([value, text]) => {
        const option = element("option", "", text);
        option.value = value;
        option.selected = String(value) === String(chosen);
        return option;
      }),
    );
  }

  function showPath(tree, number) {
    const only = number === "" ? null : pathOf(tree, tree.leaves[number].segment);
    part("path").value = number;
    for (const node of part("body").querySelectorAll("[data-segment]")) {
      node.classList.toggle("off", only !== null && !only.has(Number(node.dataset.segment)));
    }
    part("map").querySelectorAll(".block").forEach((node, index) => {
      node.classList.toggle("off", only !== null && !only.has(index));
    });
  }

  function show(number) {
    current = number;
    const tree = trees[number];
    const children = childrenOf(tree);
    const same = trees.map((other, index) => [index, other]).filter(([, other]) => other.step === tree.step);
    part("step").value = label(tree);
    options(part("question"), same.map(([index, other]) => [index, other.label]), number);
    options(part("path"), [["", "all paths"], ...tree.leaves.map((leaf, index) => [index, `path ${index + 1}: reward ${fixed(leaf.reward, 2)}`])], "");
    part("previous").disabled = number === 0;
    part("next").disabled = number === trees.length - 1;
    part("facts").replaceChildren(facts(tree));
    part("map").replaceChildren(map(tree, children, (path) => showPath(tree, path)));
    const body = part("body");
    body.replaceChildren();
    grow(tree, children, 0, body);
    body.dataset.segments = tree.segments.length;
  }

  options(part("step"), [...new Set(trees.map(label))].map((step) => [step, step]), label(trees[0]));
  part("step").addEventListener("change", (event) => show(trees.findIndex((tree) => label(tree) === event.target.value)));
  part("question").addEventListener("change", (event) => show(Number(event.target.value)));
  part("path").addEventListener("change", (event) => showPath(trees[current], event.target.value));
  part("previous").addEventListener("click", () => show(current - 1));
  part("next").addEventListener("click", () => show(current + 1));
  show(trees.length - 1);
})();
