// The keys and buttons of the grid. A decision shows once the server has written it; `element`, `server` and `watch`
// are gradio's.
const cards = () => [...element.querySelectorAll(".pair")];
const visible = () => element.offsetParent !== null;
let at = 0;

function select(next, focus = true) {
  const all = cards();
  if (!all.length) return;
  at = Math.min(Math.max(next, 0), all.length - 1);
  all.forEach((card, i) => (i === at ? card.setAttribute("aria-current", "true") : card.removeAttribute("aria-current")));
  if (focus) {
    all[at].focus({ preventScroll: true });
    all[at].scrollIntoView({ block: "nearest" });
  }
}

function columns() {
  const all = cards();
  const next = all.findIndex((card) => card.offsetTop > all[0].offsetTop);
  return next < 1 ? Math.max(all.length, 1) : next;
}

function tell(problem) {
  const line = element.querySelector(".wrong");
  line.textContent = problem || "";
  line.hidden = !problem;
}

// One after the other, in the order of the keys.
let last = Promise.resolve();
const decide = (card, decision) => (last = last.then(() => save(card, decision)));

async function save(card, decision) {
  const grid = element.querySelector(".duo-pairs");
  const locked = grid.querySelector(".locked");
  if (locked) return tell(locked.textContent);
  let told;
  try {
    told = await server.decide({ place: Number(grid.dataset.place), name: card.dataset.name, decision });
  } catch (error) {
    told = { problem: "Not saved: the page has lost its server. Start `duo app` again." };
  }
  tell(told.problem);
  if (told.problem) return;
  const state = decision || "undecided";
  card.classList.remove("keep", "reject", "undecided");
  card.classList.add(state);
  card.dataset.state = state;
  for (const [name, count] of Object.entries(told.counts)) grid.querySelector(`[data-count="${name}"]`).textContent = count;
}

element.addEventListener("click", (event) => {
  const card = event.target.closest(".pair");
  if (!card) return;
  select(cards().indexOf(card));
  const wanted = event.target.closest("button")?.dataset.decision;
  if (wanted) decide(card, card.dataset.state === wanted ? null : wanted);
});

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest?.("input, textarea, select, [contenteditable], [role=listbox], [role=tab]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !visible()) return;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns(), ArrowDown: columns(), Home: -Infinity, End: Infinity };
  const decisions = { k: "keep", r: "reject", u: null };
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in steps) {
    event.preventDefault();
    select(at + steps[key]);
  } else if (key in decisions && cards().length && !event.repeat) {
    event.preventDefault();
    const card = cards()[at];
    if (key !== "u" && !element.querySelector(".locked")) select(at + 1);
    decide(card, decisions[key]);
  }
});

watch("value", () => select(0, false));
select(0, false);
