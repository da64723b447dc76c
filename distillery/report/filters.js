// The error browser's filters. Without scripts, the whole table is shown.
const form = document.getElementById("filters");
if (form) {
  const body = document.querySelector("#rows tbody");
  const rows = Array.from(body.rows);
  const shown = document.getElementById("shown");

  function matches(row, asked) {
    const data = row.dataset;
    for (const name of ["gold", "teacher", "student", "champion"]) {
      if (asked.get(name) && data[name] !== asked.get(name)) return false;
    }
    if (asked.get("show") && !(asked.get("show") in data)) return false;
    const [low, high] = [asked.get("low"), asked.get("high")];
    if ((low || high) && data.confidence === "") return false;
    if (low && Number(data.confidence) < Number(low)) return false;
    if (high && Number(data.confidence) > Number(high)) return false;
    const text = (asked.get("text") || "").toLowerCase();
    return !text || row.cells[0].textContent.toLowerCase().includes(text);
  }

  // Rows without a confidence come last in either order.
  function sureness(row, without) {
    return row.dataset.confidence === "" ? without : Number(row.dataset.confidence);
  }

  function apply() {
    const asked = new FormData(form);
    let count = 0;
    for (const row of rows) {
      row.hidden = !matches(row, asked);
      if (!row.hidden) count += 1;
    }
    const order = asked.get("order");
    const sorted = rows.slice();
    if (order === "unsure") sorted.sort((a, b) => sureness(a, 2) - sureness(b, 2));
    if (order === "sure") sorted.sort((a, b) => sureness(b, -1) - sureness(a, -1));
    body.append(...sorted);
    shown.textContent = `${count} of ${rows.length} rows`;
  }

  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();
}
